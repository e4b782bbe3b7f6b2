"""Makes a data set from text: `python -m data.prepare --help` tells how.

    text files -> documents -> chunks of documents -> token ids -> samples -> parts -> shards

Text is streamed. Each chunk of it goes to a process, which tokenizes it and leaves its samples as a part on disk
(`data.preparing.chunks`); the samples of a group of parts, from about a gigabyte of text, are then spread over shards.
So memory is bounded whatever the corpus's size, and every shard draws from all of its group's text. The same text,
vocabulary, options and seed give the same files, byte for byte, on any number of processes and however often the run
was killed on the way (`data.preparing.staging`). Several machines may each make every N-th part
(`data.preparing.shares`).
"""

import contextlib
import math
import os
import sys
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, groupby, islice
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
import tokenizers
from tqdm import tqdm

from data.commands import parse_options, run_command, table
from data.errors import InputError
from data.masking import choice_reference
from data.preparing import splits
from data.preparing.chunks import read_part_counts
from data.preparing.corpus import Document, TextFile, documents
from data.preparing.finding import corpus_bytes, file_bytes, find_files
from data.preparing.formats import check_formats, describe, with_formats
from data.preparing.options import PrepareOptions
from data.preparing.python_prose import PYTHON
from data.preparing.remote import base_name, is_url, remote_state
from data.preparing.shares import Share, chunk_checksum, chunk_path, end_share, join_shares, remove_shares
from data.preparing.splits import TextChunk
from data.preparing.staging import Staging, check_output, open_staging
from data.preparing.vocab_training import train_vocab
from data.preparing.workers import InlineWorker, Workers
from data.samples import layout
from data.shards import FIRST_TOKENIZER
from data.subprocesses import usable_cpus
from data.tokenizer import (
    Vocabulary,
    claims_of,
    read_vocab,
    text_in_words,
    vocab_sha256,
    with_rules,
    write_tokenizer_files,
)

__all__ = ["PrepareOptions", "Summary", "main", "make_part", "make_vocab", "prepare"]

SPLIT_NAMES = ("train", "held_out")  # by number

Item = TypeVar("Item")
Pool = Union[InlineWorker, Workers]
Group = Tuple[Sequence[str], Iterator[Dict[str, Any]]]
"""the parts of a group of chunks, and the tasks that make the missing ones; the parts are known when those are done"""

# An attribute of a shard has room for 64 KB.
NAMED_FILES = 20
GROUP_CHUNKS = 256
# All the shards that are made at once: each is in memory once.
SHARDS_BYTES = 1 << 30
# A vocabulary does not get better beyond this much text: of a larger corpus every k-th document is taken.
VOCAB_TEXT_BYTES = 1 << 30

EXAMPLES = """examples:
  # phase 1 of the recipe from your own text and bert-base-uncased's vocabulary
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 128 --mask-tokens 20 \\
      --output shards128/

  # phase 2, with one document in twenty kept for evaluation
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 512 --mask-tokens 76 \\
      --held-out 0.05 --output shards512/

  # another language than English: accents, vowel signs and capitals as they are, composed characters (--lowercase
  # --keep-accents for a model that does not tell capitals)
  python -m data.prepare --input 'korpus/*.txt' --cased --normalization nfc --vocab-size 32000 --output shards-tr/

  # the vocabulary of a BERT that is to be adapted, with its tokenizer_config.json or tokenizer.json beside it
  python -m data.prepare --input 'corpus/*.txt' --vocab bert-base-cased/ --output shards/

  # WikiExtractor's output, five times over and masked anew by the loader in each epoch; if it is killed, the same
  # command goes on from there
  python -m data.prepare --input 'extracted/*/wiki_*.zst' --format wikiextractor --vocab vocab.txt --duplicates 5 \\
      --masking dynamic --output shards128/

  # a spreadsheet saved as CSV, all text files of a folder, text in Japanese Windows' encoding
  python -m data.prepare --input reviews.csv --text-field review --vocab vocab.txt --output shards/
  python -m data.prepare --input corpus/ --vocab vocab.txt --output shards/
  python -m data.prepare --input 'old/*.txt' --encoding shift_jis --vocab vocab.txt --output shards/

  # two sources, one of them gone over three times: folders beside each other, made with one vocabulary, are trained on
  # together (--data.files 'shards/*/train-*.h5'), and data.inspect shows their shares
  python -m data.prepare --input wiki/ --vocab vocab.txt --output shards/wiki/
  python -m data.prepare --input books/ --vocab vocab.txt --duplicates 3 --output shards/books/

  # samples of one segment, for MLM alone
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --nsp false --output shards/

  # text that lies elsewhere: `pip install fsspec s3fs`, and the same for gs://, hf://, https:// with their packages
  python -m data.prepare --input 's3://bucket/corpus/*.txt.zst' --vocab vocab.txt --output shards/

  # on 16 machines with one output folder, here as a Slurm array (sbatch --array=1-16); the last line once all ended
  python -m data.prepare --part $SLURM_ARRAY_TASK_ID/16 --input 'corpus/*.txt' --vocab vocab.txt --output shards/
  python -m data.prepare --finish 16 --input 'corpus/*.txt' --vocab vocab.txt --output shards/

  # the vocabulary alone, for the parts: shards/vocab.txt
  python -m data.prepare --vocab-only --input 'corpus/*.txt' --output shards/

  # no text at hand: the manual and the docstrings of this Python, with a vocabulary trained on them
  python -m data.prepare --input python --vocab-size 8192 --output shards/

The output folder gets train-00000.h5 and so on, held_out-00000.h5 and so on, vocab.txt, tokenizer.json and
tokenizer_config.json; data/FORMAT.md describes the shards. The same text, options and seed give the same files, on any
number of processes. Until they are whole they are in .NAME.unfinished, beside the output folder or, where that is there
already, in it; what a stopped run has done there is used when the same command is given again (the text is read up to
there, not tokenized). Remove that folder to begin anew. docs/preparing.md is about many machines and remote text."""


@dataclass
class Summary:
    """What `prepare` did; printed, it is the command's report."""

    output: str
    nsp: bool  # samples are pairs of segments
    vocab_size: int
    train_documents: int
    held_out_documents: int
    lines: int
    empty_lines: int  # lines without a token: control characters only
    tokens: int  # of the text, once
    unknown_tokens: int
    rules: str  # Vocabulary.rules
    characters: int  # of a sample of the text, but white space
    altered_characters: int  # of these, how many normalisation took more from than their case
    altered: Dict[str, int]  # the most frequent of these, and how often they occur
    dropped_tokens: int  # in documents of one token that had no other document to be paired with
    train_samples: int
    held_out_samples: int
    train_shards: int
    held_out_shards: int
    not_next_samples: int
    sample_tokens: int
    slots: int  # samples times sequence length

    @property
    def documents(self) -> int:
        return self.train_documents + self.held_out_documents

    def __str__(self) -> str:
        samples = self.train_samples + self.held_out_samples
        altered = self.altered_characters / self.characters if self.characters else None
        why = "documents of one token without another document to pair them with"
        dropped = f"{self.dropped_tokens:,} dropped ({why if self.dropped_tokens else 'none cut off'})"
        unknown = f"{100 * self.unknown_tokens / max(1, self.tokens):.2f} % [UNK]"
        not_next = f"{100 * self.not_next_samples / samples:.1f} % of the second segments do not follow the first"
        train = f"{self.train_samples:,} to train on in {self.train_shards} shards"
        warning = (
            "few second segments are random, so that NSP has little to learn: random ones need other documents nearby "
            f"(the text has {self.documents:,}). End each document by a blank line (--format lines), give it a file of "
            "its own, or give --nsp false"
        )
        rare = "over 1 %: the vocabulary lacks letters of this text. Train one on it, or a larger one (--vocab-size)"
        return table(
            {
                "documents": f"{self.documents:,}, of which {self.held_out_documents:,} held out",
                "lines": f"{self.lines - self.empty_lines:,}, and {self.empty_lines:,} without a token",
                "tokens": f"{self.tokens - self.dropped_tokens:,} used, {dropped}, {unknown}",
                "samples": f"{train}, {self.held_out_samples:,} held out in {self.held_out_shards}",
                "NSP": not_next if self.nsp else "none: samples are of one segment",
                **text_in_words(self.rules, altered, self.altered),
                "padding": f"{100 - 100 * self.sample_tokens / self.slots:.1f} % of the token slots",
                "vocabulary": f"{self.vocab_size:,} tokens",
                "written to": self.output,
                **({"[UNK]": f"warning: {rare}"} if 100 * self.unknown_tokens > self.tokens else {}),
                **({"warning": warning} if self.nsp and 4 * self.not_next_samples < samples else {}),
            }
        )


def prepare(options: PrepareOptions, progress: bool = True) -> Summary:
    """Makes the data set `options.output`: train-*.h5, held_out-*.h5 if asked for, vocab.txt, tokenizer.json,
    tokenizer_config.json. With `options.finish` it makes it of the parts that are there (`make_part`).

    Continues a run that was stopped. Raises InputError for anything that cannot be used: an option, a file that is
    missing or not as its format says, a text without samples, a vocabulary, an output folder that holds a data set, or
    another run's work on it. Nothing is left behind then, but for parts. Raises PrepareStopped when a process dies, the
    disk is full, or a remote file breaks off; what was done stays.
    """
    files, vocabulary = check_input(options)
    made_of = identity(options, files, vocabulary)
    with open_staging(options.output, made_of) as staging:
        used = partial(remove_shares, options.output, options.finish or 0)
        if staging.report is not None:  # a run that was killed as it ended had done all
            used()
            staging.remove()
            return Summary(**dict(staging.report, output=options.output))
        trained = os.path.join(staging.data, "vocab.txt")  # by a stopped run
        if vocabulary is None and os.path.exists(trained):
            vocabulary = read_vocab(trained, [claims_of(options)])
        vocabulary = vocabulary or train_on(files, options, progress)
        write_tokenizer_files(staging.data, vocabulary)
        if options.finish:
            parts = join_shares(options.output, options.finish, made_of)
            few, groups = len(parts) < 2, joined_groups(parts, progress)
        else:
            few, chunks = peek(read_chunks(files, options, progress))
            groups = groups_of(chunks, staging)
        with open_pool(few, vocabulary, files, options, staging) as pool:
            records = make_groups(groups, staging, options, len(vocabulary), pool)
        summary = summarize(options, vocabulary, records)
        check_samples_made(summary, files, options.held_out)
        staging.publish(asdict(summary), then=used)
    return summary


def make_part(options: PrepareOptions, progress: bool = True) -> str:
    """Makes one of the parts that `prepare` joins, `options.part`, and gives the command's report.

    Continues a part that was stopped; one that is whole stays as it is. Raises as `prepare` does.
    """
    files, vocabulary = check_input(options)
    assert options.part and vocabulary  # or the check would have failed
    share = Share(options.output, *map(int, options.part.split("/")))
    made_of = identity(options, files, vocabulary)
    if os.path.isdir(share.folder):
        share.check(made_of)
        return table({"part": f"{options.part} is there already, made with these options", "in": share.folder})
    with open_staging(share.folder, made_of, share.staging) as staging:
        checksums: List[str] = []

        def tasks() -> Iterator[Dict[str, Any]]:
            for number, chunk in enumerate(read_chunks(files, options, progress)):
                checksums.append(chunk_checksum(chunk))
                path = chunk_path(staging.data, number, checksums[-1])
                if share.has(number) and not os.path.exists(path):
                    yield part_task(path, number, chunk)

        few, missing = peek(tasks())
        with open_pool(few, vocabulary, files, options, staging) as pool:
            run_all(missing, pool, workers_of(options) + 2)
        end_share(staging, made_of, checksums)
    own = len(range(share.number - 1, len(checksums), share.count))
    return table(
        {
            "part": f"{options.part}, {own:,} of {len(checksums):,} chunks of the text",
            "written to": share.folder,
            "next": f"once all parts are there, the same command with --finish {share.count} instead of --part",
        }
    )


def make_vocab(options: PrepareOptions, progress: bool = True) -> str:
    """Trains the vocabulary of a text, writes vocab.txt, tokenizer.json and tokenizer_config.json to `options.output`,
    and gives the command's report."""
    files, _ = check_input(options)
    vocabulary = train_on(files, options, progress)
    os.makedirs(options.output, exist_ok=True)
    write_tokenizer_files(options.output, vocabulary)
    path = os.path.join(options.output, "vocab.txt")
    return table({"vocabulary": f"{len(vocabulary):,} tokens", "text": vocabulary.in_words(), "written to": path})


def check_input(options: PrepareOptions) -> Tuple[List[TextFile], Optional[Vocabulary]]:
    """The files of the text and the vocabulary, if one is given; raises InputError for what cannot be used."""
    options.check()
    files = with_formats(find_files(options.input), options.format, options.encoding, options.text_field)
    if not options.finish:  # which does not read the text
        check_formats(files, options.format)
    check_output(options.output, options.vocab)
    return files, read_vocab(options.vocab, [claims_of(options)], strict=True) if options.vocab else None


def paths_of(files: Sequence[TextFile]) -> List[str]:
    return [file.path for file in files]


def read_documents(files: Sequence[TextFile], purpose: str, progress: bool) -> Iterator[Document]:
    total = corpus_bytes(paths_of(files))
    with tqdm(total=total, unit="B", unit_scale=True, desc=purpose, disable=not progress) as bar:
        yield from documents(files, bar.update)


def read_chunks(files: Sequence[TextFile], options: PrepareOptions, progress: bool) -> Iterator[TextChunk]:
    texts = read_documents(files, "samples", progress)
    return splits.split_into_chunks(texts, options.held_out, options.seed)


def train_on(files: Sequence[TextFile], options: PrepareOptions, progress: bool) -> Vocabulary:
    """The vocabulary of a text: of a long one's, every k-th document's."""
    stride = -(-corpus_bytes(paths_of(files)) // VOCAB_TEXT_BYTES) or 1

    def texts() -> Iterator[List[str]]:
        read = read_documents(files, "vocabulary", progress)
        return (text for number, text in read if number % stride == 0)

    rules = {name: value for name, (_, value) in claims_of(options).items()}
    return train_vocab(texts, options.vocab_size, with_rules([], rules))


def open_pool(
    few: bool, vocabulary: Vocabulary, files: Sequence[TextFile], options: PrepareOptions, staging: Staging
) -> "contextlib.closing[Pool]":
    """What does tasks; `few` are done here and now."""
    settings = {
        "vocabulary": asdict(vocabulary),
        "options": asdict(replace(options, input=[])),
        "choose": choice_reference(options.units),
        "made_by": made_by(options, files),
    }
    workers = workers_of(options)
    inline = few or workers == 1
    return contextlib.closing(InlineWorker(settings) if inline else Workers(settings, workers, staging.lock))


def peek(items: Iterator[Item]) -> Tuple[bool, Iterator[Item]]:
    """Whether there are fewer than two, and all of them."""
    first = list(islice(items, 2))
    return len(first) < 2, chain(first, items)


def made_by(options: PrepareOptions, files: Sequence[TextFile]) -> Dict[str, Any]:
    """What the shards say of how they were made."""
    names = ("mask_share", "short_share", "duplicates", "held_out", "seed", "masking")
    return {
        "command": "data.prepare",
        "input": [base_name(file.path) for file in files[:NAMED_FILES]],
        "input_files": len(files),
        "format": describe(files),
        **{name: getattr(options, name) for name in names},
        "whole_word_masking": options.units == "words",
        **({} if options.units in ("tokens", "words") else {"masked_units": options.units}),
        **({} if options.nsp else {"nsp": False}),
    }


def identity(options: PrepareOptions, files: Sequence[TextFile], vocabulary: Optional[Vocabulary]) -> Dict[str, Any]:
    """What has to be the same for a stopped run to be continued (name -> JSON value)."""
    free = ("input", "output", "workers", "whole_word_masking", "part", "finish", "vocab_only")
    described = ("text_field", "encoding")  # with the format
    # Where files lie, and since when, may differ between machines; parts have a checksum of the text.
    state = portable_state if options.part or options.finish else file_state
    return {
        **{name: value for name, value in asdict(options).items() if name not in (*free, *described)},
        # A run that an earlier release began may have taken formulas for titles.
        "format": describe(files).replace("wikitext", "wikitext with blank lines around titles"),
        "files": [state(path) for path in paths_of(files)],
        "vocab": vocabulary and vocab_sha256(vocabulary.tokens),
        "normalised": vocabulary.rules if vocabulary and vocabulary.rules != FIRST_TOKENIZER else None,
        "vocab_size": None if vocabulary else options.vocab_size,
        "masked_units": options.units,
        "version of numpy": np.__version__,
        "version of tokenizers": tokenizers.__version__,
        "chunk characters": splits.CHUNK_CHARACTERS,
        "chunks of a group": GROUP_CHUNKS,
    }


def file_state(path: str) -> List[Union[str, int]]:
    """What tells whether a file is still the one that a stopped run has read."""
    if path == PYTHON:
        return [path, sys.version]
    if is_url(path):
        return remote_state(path)
    state = os.stat(path)
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def portable_state(path: str) -> List[Union[str, int]]:
    """What has to be the same of a file on all machines."""
    return [base_name(path), file_bytes(path)]


def groups_of(chunks: Iterator[TextChunk], staging: Staging) -> Iterator[Group]:
    for _, numbered in groupby(enumerate(chunks), lambda pair: pair[0] // GROUP_CHUNKS):
        parts: List[str] = []
        yield parts, part_tasks(numbered, staging, parts)


def joined_groups(parts: Sequence[str], progress: bool) -> Iterator[Group]:
    for start in tqdm(range(0, len(parts), GROUP_CHUNKS), unit="group", desc="shards", disable=not progress):
        yield parts[start : start + GROUP_CHUNKS], iter(())


def make_groups(
    groups: Iterator[Group], staging: Staging, options: PrepareOptions, vocab_size: int, pool: Pool
) -> List[Dict[str, Any]]:
    """Makes what is missing of the parts and then of the shards of each group of chunks; gives the groups' records.

    A record has the counts of the group's parts, and the number of its shards by split.
    """
    workers = workers_of(options)
    datasets = layout(options.sequence_length, options.mask_tokens, vocab_size).values()
    sample_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in datasets)
    shards_at_once = max(1, min(workers, SHARDS_BYTES // (options.samples_per_shard * sample_bytes)))
    records = staging.groups()
    for group, (parts, tasks) in enumerate(groups):
        if group < len(records):
            continue
        run_all(tasks, pool, workers + 2)
        record, shards = shard_tasks(parts, staging, options, records)
        run_all(shards, pool, shards_at_once)
        # What other machines made stays until the data set is whole: only they could make it again.
        staging.end_group(group, record, [] if options.finish else parts)
        records.append(record)
    return records


def part_tasks(
    numbered: Iterable[Tuple[int, TextChunk]], staging: Staging, parts: List[str]
) -> Iterator[Dict[str, Any]]:
    """The tasks that make the missing parts of a group of numbered chunks; appends the paths of all to `parts`."""
    for number, chunk in numbered:
        path = staging.part(number)
        parts.append(path)
        if not os.path.exists(path):
            yield part_task(path, number, chunk)


def part_task(path: str, number: int, chunk: TextChunk) -> Dict[str, Any]:
    split, texts = chunk
    return {"do": "make_part", "path": path, "number": number, "split": split, "documents": texts}


def shard_tasks(
    parts: Sequence[str], staging: Staging, options: PrepareOptions, records: Sequence[Dict[str, Any]]
) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """A group's record, and the tasks that spread the samples of its parts over shards of about equal size.

    Each part is in random order, so that its k-th stretch is a random share of it.
    """
    record: Dict[str, Any] = {"parts": [read_part_counts(path) for path in parts], "shards": []}
    counted, altered = (
        sum(part.get(name, 0) for part in record["parts"]) for name in ("characters", "altered_characters")
    )
    share = round(altered / counted, 6) if counted else None  # parts of an earlier release do not tell
    tasks = []
    for split, name in enumerate(SPLIT_NAMES):
        samples = {path: counts["samples"] for path, counts in zip(parts, record["parts"]) if counts["split"] == split}
        shards = -(-sum(samples.values()) // options.samples_per_shard)
        before = sum(earlier["shards"][split] for earlier in records)
        for shard in range(shards):
            path = os.path.join(staging.data, f"{name}-{before + shard:05}.h5")
            if not os.path.exists(path):
                pieces = [(part, shard * n // shards, (shard + 1) * n // shards) for part, n in samples.items()]
                seed = [options.seed, split, before + shard]
                tasks.append({"do": "make_shard", "path": path, "pieces": pieces, "seed": seed, "altered": share})
        record["shards"].append(shards)
    return record, tasks


def workers_of(options: PrepareOptions) -> int:
    return options.workers or usable_cpus()


def run_all(tasks: Iterable[Dict[str, Any]], pool: Pool, limit: int) -> None:
    """Has tasks done, at most `limit` at a time."""
    pending: Deque[Future[None]] = deque()
    for task in tasks:
        if len(pending) >= limit:
            pending.popleft().result()
        pending.append(pool.submit(task))
    for future in pending:
        future.result()


def summarize(options: PrepareOptions, vocabulary: Vocabulary, groups: Sequence[Dict[str, Any]]) -> Summary:
    counts = dict.fromkeys((field.name for field in fields(Summary)), 0)
    last: Dict[str, int] = {}
    altered: Counter = Counter()
    for part in chain.from_iterable(group["parts"] for group in groups):
        split = SPLIT_NAMES[part["split"]]
        # A long document may continue in the next chunk of its split.
        counts[f"{split}_documents"] += part["documents"] - (part["first"] == last.get(split, -1))
        counts[f"{split}_samples"] += part["samples"]
        altered.update(part.get("altered", {}))
        for name in counts.keys() & part.keys() - {"altered"}:  # of lines, tokens and characters
            counts[name] += part[name]
        if part["last"] is not None:
            last[split] = part["last"]
    for split, shards in zip(SPLIT_NAMES, zip(*[group["shards"] for group in groups])):
        counts[f"{split}_shards"] = sum(shards)
    slots = (counts["train_samples"] + counts["held_out_samples"]) * options.sequence_length
    own: Dict[str, Any] = {"output": options.output, "nsp": options.nsp, "slots": slots}
    own.update(vocab_size=len(vocabulary), rules=vocabulary.rules, altered=dict(altered.most_common(5)))
    return Summary(**{**counts, **own})


def check_samples_made(summary: Summary, files: Sequence[TextFile], held_out: float) -> None:
    if not summary.slots:
        names = ", ".join(paths_of(files)[:NAMED_FILES])
        raise InputError(
            f"{names}: no text to make a sample of ({summary.lines} lines, {summary.tokens} tokens); "
            "expected documents of one sentence or paragraph a line"
        )
    fault = advice = ""
    if not summary.train_samples:
        fault, advice = "leaves nothing to train on", "Give more documents or a smaller share"
    elif held_out and not summary.held_out_samples:
        fault, advice = "holds nothing out", "Give more documents, a larger share, or 0"
    if fault:
        raise InputError(
            f"--held-out is {held_out:g} and {fault}: the text has {summary.documents} documents with a token, of "
            f"which {summary.held_out_documents} were held out. {advice}"
        )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status, as `run_command` says."""
    options = parse_options(PrepareOptions, arguments, "data.prepare", EXAMPLES)
    advice = f"{options.output} is not whole; the same command goes on from here"
    command: Callable[[PrepareOptions], object] = prepare
    if options.part or options.vocab_only:
        command = make_part if options.part else make_vocab
    return run_command(lambda: print(command(options)), advice)


if __name__ == "__main__":
    sys.exit(main())
