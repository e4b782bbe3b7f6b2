"""Makes a data set from text: `python -m data.prepare --help` tells how.

    text files -> documents -> chunks of documents -> token ids -> samples -> parts -> shards

Text is streamed. Each chunk of it goes to a process, which tokenizes it and leaves its samples as a part on disk
(`data.preparing.chunks`); the samples of a group of parts, from about a gigabyte of text, are then spread over shards.
So memory is bounded whatever the corpus's size, and every shard draws from all of its group's text. The same text,
vocabulary, options and seed give the same files, byte for byte, on any number of processes and however often the run
was killed on the way (`data.preparing.staging`).
"""

import contextlib
import math
import os
import sys
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, groupby, islice
from typing import Any, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import tokenizers
from tqdm import tqdm

from data.commands import parse_options, run_command, table
from data.errors import InputError
from data.masking import choice_reference
from data.preparing import splits
from data.preparing.chunks import read_part_counts
from data.preparing.corpus import Document, check_formats, corpus_bytes, documents, find_files
from data.preparing.options import PrepareOptions
from data.preparing.python_prose import PYTHON
from data.preparing.splits import TextChunk
from data.preparing.staging import Staging, check_output, open_staging
from data.preparing.workers import InlineWorker, Workers
from data.samples import layout
from data.tokenizer import read_vocab, train_vocab, vocab_sha256, write_tokenizer_files

__all__ = ["PrepareOptions", "Summary", "main", "prepare"]

SPLIT_NAMES = ("train", "held_out")  # by number

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

  # WikiExtractor's output, five times over and masked anew by the loader in each epoch; if it is killed, the same
  # command goes on from there
  python -m data.prepare --input 'extracted/*/wiki_*.zst' --format wikiextractor --vocab vocab.txt --duplicates 5 \\
      --masking dynamic --output shards128/

  # samples of one segment, for MLM alone
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --nsp false --output shards/

  # no text at hand: the manual and the docstrings of this Python, with a vocabulary trained on them
  python -m data.prepare --input python --vocab-size 8192 --output shards/

The output folder gets train-00000.h5 and so on, held_out-00000.h5 and so on, vocab.txt, tokenizer.json and
tokenizer_config.json; data/FORMAT.md describes the shards. The same text, options and seed give the same files, on any
number of processes. Until they are whole they are in .NAME.unfinished, beside the output folder or, where that is there
already, in it; what a stopped run has done there is used when the same command is given again (the text is read up to
there, not tokenized). Remove that folder to begin anew."""


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
        why = "documents of one token without another document to pair them with"
        dropped = f"{self.dropped_tokens:,} dropped ({why if self.dropped_tokens else 'none cut off'})"
        unknown = f"{100 * self.unknown_tokens / max(1, self.tokens):.2f} % [UNK]"
        not_next = f"{100 * self.not_next_samples / samples:.1f} % of the second segments do not follow the first"
        train = f"{self.train_samples:,} to train on in {self.train_shards} shards"
        return table(
            {
                "documents": f"{self.documents:,}, of which {self.held_out_documents:,} held out",
                "lines": f"{self.lines - self.empty_lines:,}, and {self.empty_lines:,} without a token",
                "tokens": f"{self.tokens - self.dropped_tokens:,} used, {dropped}, {unknown}",
                "samples": f"{train}, {self.held_out_samples:,} held out in {self.held_out_shards}",
                "NSP": not_next if self.nsp else "none: samples are of one segment",
                "padding": f"{100 - 100 * self.sample_tokens / self.slots:.1f} % of the token slots",
                "vocabulary": f"{self.vocab_size:,} tokens",
                "written to": self.output,
            }
        )


def prepare(options: PrepareOptions, progress: bool = True) -> Summary:
    """Makes the data set `options.output`: train-*.h5, held_out-*.h5 if asked for, vocab.txt, tokenizer.json,
    tokenizer_config.json.

    Continues a run that was stopped. Raises InputError for anything that cannot be used: an option, a file that is
    missing or not as its format says, a text without samples, a vocabulary, an output folder that holds a data set, or
    another run's work on it. Nothing is left behind then. Raises PrepareStopped when a process dies or the disk is
    full; what was done stays.
    """
    options.check()
    choose = choice_reference(options.units)
    files = find_files(options.input)
    check_formats(files, options.format)
    check_output(options.output, options.vocab)
    tokens = None if options.vocab is None else read_vocab(options.vocab)
    total, size = corpus_bytes(files), options.vocab_size

    def read(purpose: str) -> Iterator[Document]:
        with tqdm(total=total, unit="B", unit_scale=True, desc=purpose, disable=not progress) as bar:
            yield from documents(files, options.format, bar.update)

    with open_staging(options.output, identity(options, files, tokens)) as staging:
        if staging.report is not None:  # a run that was killed as it ended had done all
            staging.remove()
            return Summary(**dict(staging.report, output=options.output))
        trained = os.path.join(staging.data, "vocab.txt")  # by a stopped run
        if tokens is None and os.path.exists(trained):
            tokens = read_vocab(trained)
        if tokens is None:
            stride = -(-total // VOCAB_TEXT_BYTES) or 1
            tokens = train_vocab(lambda: (text for number, text in read("vocabulary") if number % stride == 0), size)
        write_tokenizer_files(staging.data, tokens)
        chunks = splits.split_into_chunks(read("samples"), options.held_out, options.seed)
        settings = {"tokens": tokens, "options": asdict(replace(options, input=[])), "choose": choose}
        groups = make_groups(chunks, staging, options, {**settings, "made_by": made_by(options, files)})
        summary = summarize(options, len(tokens), groups)
        check_samples_made(summary, files, options.held_out)
        staging.publish(asdict(summary))
    return summary


def made_by(options: PrepareOptions, files: Sequence[str]) -> Dict[str, Any]:
    """What the shards say of how they were made."""
    names = ("format", "mask_share", "short_share", "duplicates", "held_out", "seed", "masking")
    return {
        "command": "data.prepare",
        "input": [os.path.basename(path) for path in files[:NAMED_FILES]],
        "input_files": len(files),
        **{name: getattr(options, name) for name in names},
        "whole_word_masking": options.units == "words",
        **({} if options.units in ("tokens", "words") else {"masked_units": options.units}),
        **({} if options.nsp else {"nsp": False}),
    }


def identity(options: PrepareOptions, files: Sequence[str], tokens: Optional[List[str]]) -> Dict[str, Any]:
    """What has to be the same for a stopped run to be continued (name -> JSON value)."""
    free = ("input", "output", "workers", "whole_word_masking")
    return {
        **{name: value for name, value in asdict(options).items() if name not in free},
        "files": [file_state(path) for path in files],
        "vocab": tokens and vocab_sha256(tokens),
        "vocab_size": None if tokens else options.vocab_size,
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
    state = os.stat(path)
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def make_groups(
    chunks: Iterator[TextChunk], staging: Staging, options: PrepareOptions, settings: Dict[str, Any]
) -> List[Dict[str, Any]]:
    """Makes what is missing of the parts and then of the shards of each group of chunks; gives the groups' records.

    `settings` are ChunkMaker's. A record has the counts of the group's parts, and the number of its shards by split.
    """
    workers = options.workers or len(os.sched_getaffinity(0))
    datasets = layout(options.sequence_length, options.mask_tokens, len(settings["tokens"])).values()
    sample_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in datasets)
    shards_at_once = max(1, min(workers, SHARDS_BYTES // (options.samples_per_shard * sample_bytes)))
    first, records = list(islice(chunks, 2)), staging.groups()
    few = len(first) < 2 or workers == 1
    pool = InlineWorker(settings) if few else Workers(settings, workers, staging.lock)
    with contextlib.closing(pool):
        for group, numbered in groupby(enumerate(chain(first, chunks)), lambda pair: pair[0] // GROUP_CHUNKS):
            if group < len(records):
                continue
            parts: List[str] = []
            run_all(part_tasks(numbered, staging, parts), pool, workers + 2)
            record, tasks = shard_tasks(parts, staging, options, records)
            run_all(tasks, pool, shards_at_once)
            staging.end_group(group, record, parts)
            records.append(record)
    return records


def part_tasks(
    numbered: Iterable[Tuple[int, TextChunk]], staging: Staging, parts: List[str]
) -> Iterator[Dict[str, Any]]:
    """The tasks that make the missing parts of a group of numbered chunks; appends the paths of all to `parts`."""
    for number, (split, texts) in numbered:
        path = staging.part(number)
        parts.append(path)
        if not os.path.exists(path):
            yield {"do": "make_part", "path": path, "number": number, "split": split, "documents": texts}


def shard_tasks(
    parts: Sequence[str], staging: Staging, options: PrepareOptions, records: Sequence[Dict[str, Any]]
) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """A group's record, and the tasks that spread the samples of its parts over shards of about equal size.

    Each part is in random order, so that its k-th stretch is a random share of it.
    """
    record: Dict[str, Any] = {"parts": [read_part_counts(path) for path in parts], "shards": []}
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
                tasks.append({"do": "make_shard", "path": path, "pieces": pieces, "seed": seed})
        record["shards"].append(shards)
    return record, tasks


def run_all(tasks: Iterable[Dict[str, Any]], pool: Union[InlineWorker, Workers], limit: int) -> None:
    """Has tasks done, at most `limit` at a time."""
    pending: Deque[Future[None]] = deque()
    for task in tasks:
        if len(pending) >= limit:
            pending.popleft().result()
        pending.append(pool.submit(task))
    for future in pending:
        future.result()


def summarize(options: PrepareOptions, vocab_size: int, groups: Sequence[Dict[str, Any]]) -> Summary:
    counts = dict.fromkeys((field.name for field in fields(Summary)), 0)
    last: Dict[str, int] = {}
    for part in chain.from_iterable(group["parts"] for group in groups):
        split = SPLIT_NAMES[part["split"]]
        # A long document may continue in the next chunk of its split.
        counts[f"{split}_documents"] += part["documents"] - (part["first"] == last.get(split, -1))
        counts[f"{split}_samples"] += part["samples"]
        for name in counts.keys() & part.keys():  # of lines and tokens
            counts[name] += part[name]
        if part["last"] is not None:
            last[split] = part["last"]
    for split, shards in zip(SPLIT_NAMES, zip(*[group["shards"] for group in groups])):
        counts[f"{split}_shards"] = sum(shards)
    slots = (counts["train_samples"] + counts["held_out_samples"]) * options.sequence_length
    own: Dict[str, Any] = {"output": options.output, "nsp": options.nsp, "vocab_size": vocab_size, "slots": slots}
    return Summary(**{**counts, **own})


def check_samples_made(summary: Summary, files: Sequence[str], held_out: float) -> None:
    if not summary.slots:
        raise InputError(
            f"{', '.join(files)}: no text to make a sample of ({summary.lines} lines, {summary.tokens} tokens); "
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
    return run_command(lambda: print(prepare(options)), advice)


if __name__ == "__main__":
    sys.exit(main())
