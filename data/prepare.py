"""Makes a data set from text: `python -m data.prepare --help` tells how.

    text files -> documents -> chunks of documents -> token ids -> samples -> parts -> shards

Text is streamed. Chunk after chunk of it goes to a process, which tokenizes it and leaves its samples as a part on disk
(`data.preparing.chunks`); the parts of a group of chunks, about a gigabyte of text, are then dealt over shards. So
memory is bounded whatever the corpus's size, and every shard draws from all of its group's text. The same text,
vocabulary, options and seed give the same files, byte for byte, on any number of processes and however often the run
was killed on the way (`data.preparing.staging`).
"""

import argparse
import contextlib
import math
import os
import random
import sys
from collections import deque
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import tokenizers
from tqdm import tqdm

from data.errors import InputError, PrepareStopped
from data.preparing.chunks import HELD_OUT, TRAIN, Recipe, read_part_counts
from data.preparing.corpus import FORMATS, PYTHON, Document, check_formats, corpus_bytes, documents, find_files
from data.preparing.staging import Staging, check_output, moving, open_staging
from data.preparing.workers import InlineWorker, Workers
from data.samples import layout
from data.tokenizer import read_vocab, train_vocab, vocab_sha256, write_tokenizer_files

__all__ = ["Summary", "main", "prepare"]

SHARD_NAMES = ("train-%05d.h5", "held_out-%05d.h5")
MASKINGS = ("static", "dynamic")

# An attribute of a shard has room for 64 KB.
NAMED_FILES = 20
CHUNK_CHARACTERS = 1 << 22
GROUP_CHUNKS = 256
# All the shards that are made at once: each is in memory once.
SHARDS_BYTES = 1 << 30
# A vocabulary does not get better beyond this much text: of a larger corpus every k-th document is taken.
VOCAB_TEXT_BYTES = 1 << 30


@dataclass
class Summary:
    """What `prepare` did; printed, it is the command's report."""

    output: str
    vocab_size: int = 0
    documents: int = 0
    held_out_documents: int = 0
    lines: int = 0
    empty_lines: int = 0
    """lines without a token: control characters only"""
    tokens: int = 0
    """of the text, once"""
    unknown_tokens: int = 0
    dropped_tokens: int = 0
    """in documents of one token that had no other document to be paired with"""
    train_samples: int = 0
    held_out_samples: int = 0
    train_shards: int = 0
    held_out_shards: int = 0
    not_next_samples: int = 0
    sample_tokens: int = 0
    slots: int = 0
    """samples times sequence length"""

    def __str__(self) -> str:
        samples = self.train_samples + self.held_out_samples
        dropped = (
            "documents of one token without another document to pair them with"
            if self.dropped_tokens
            else "none cut off"
        )
        return "\n".join(
            [
                f"documents   {thousands(self.documents)}, of which {thousands(self.held_out_documents)} held out",
                (
                    f"lines       {thousands(self.lines - self.empty_lines)}, and {thousands(self.empty_lines)} "
                    "without a token"
                ),
                (
                    f"tokens      {thousands(self.tokens - self.dropped_tokens)} used, "
                    f"{thousands(self.dropped_tokens)} dropped ({dropped}), "
                    f"{100 * self.unknown_tokens / max(1, self.tokens):.2f} % [UNK]"
                ),
                (
                    f"samples     {thousands(self.train_samples)} to train on in {self.train_shards} shards, "
                    f"{thousands(self.held_out_samples)} held out in {self.held_out_shards}"
                ),
                (
                    f"NSP         {100 * self.not_next_samples / samples:.1f} % of the second segments do not "
                    "follow the first"
                ),
                f"padding     {100 - 100 * self.sample_tokens / self.slots:.1f} % of the token slots",
                f"vocabulary  {thousands(self.vocab_size)} words",
                f"written to  {self.output}",
            ]
        )


def thousands(count: int) -> str:
    return format(count, ",")


def prepare(
    input: Sequence[str],
    output: str,
    format: str = "lines",
    vocab: Optional[str] = None,
    vocab_size: int = 30522,
    sequence_length: int = 128,
    mask_tokens: int = 20,
    mask_share: float = 0.15,
    masking: str = "static",
    whole_word_masking: bool = False,
    short_share: float = 0.1,
    duplicates: int = 1,
    held_out: float = 0.0,
    samples_per_shard: int = 262144,
    seed: int = 42,
    workers: Optional[int] = None,
    progress: bool = True,
) -> Summary:
    """Makes the data set `output`: train-*.h5, held_out-*.h5 if asked for, vocab.txt, tokenizer.json,
    tokenizer_config.json.

    The arguments are the command's options; `workers` None stands for all cores. A run that was stopped is gone on
    with. Raises InputError for anything that cannot be used: an option, a file that is missing or not as its format
    says, a text without samples, a vocabulary, an output folder that holds a data set, or another run's work on it.
    Nothing is left behind then. Raises PrepareStopped when a process dies or the disk is full; what was done stays.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    check_options(
        format,
        sequence_length,
        mask_tokens,
        mask_share,
        masking,
        short_share,
        duplicates,
        held_out,
        samples_per_shard,
        seed,
        workers,
    )
    files = find_files(input)
    check_formats(files, format)
    if not moving(output):
        check_output(output, vocab)
    words = None if vocab is None else read_vocab(vocab)
    total = corpus_bytes(files)

    def read(purpose):
        with tqdm(total=total, unit="B", unit_scale=True, desc=purpose, disable=not progress) as bar:
            yield from documents(files, format, bar.update)

    made_by = {
        "command": "data.prepare",
        "input": [os.path.basename(path) for path in files[:NAMED_FILES]],
        "input_files": len(files),
        "format": format,
        "mask_share": mask_share,
        "short_share": short_share,
        "duplicates": duplicates,
        "held_out": held_out,
        "seed": seed,
        "masking": masking,
        "whole_word_masking": whole_word_masking,
    }
    recipe = Recipe(
        sequence_length, mask_tokens, mask_share, short_share, duplicates, masking, whole_word_masking, seed, made_by
    )
    options = dict(made_by, **asdict(recipe))
    del options["made_by"], options["input"], options["input_files"]  # which hold the same in other words
    options.update(
        {
            "files": [file_state(path) for path in files],
            "vocab": words and vocab_sha256(words),
            "vocab_size": None if words else vocab_size,
            "samples_per_shard": samples_per_shard,
            "version of numpy": np.__version__,
            "version of tokenizers": tokenizers.__version__,  # which decide the bytes, too
            "chunk characters": CHUNK_CHARACTERS,
            "chunks of a group": GROUP_CHUNKS,
        }
    )

    with open_staging(output, options) as staging:
        if staging.report is not None:  # a run that was killed as it ended had done all
            staging.remove()
            return Summary(**dict(staging.report, output=output))
        words = words or begun_vocab(staging)
        if words is None:
            stride = -(-total // VOCAB_TEXT_BYTES) or 1
            words = train_vocab(
                lambda: (document.lines for document in read("vocabulary") if document.number % stride == 0), vocab_size
            )
        write_tokenizer_files(staging.data, words)
        chunks = text_chunks(read("samples"), held_out, seed)
        first = list(islice(chunks, 2))
        pool = (
            InlineWorker(words, recipe)
            if len(first) < 2 or workers == 1
            else Workers(words, recipe, workers, staging.lock)
        )
        with contextlib.closing(pool):
            make_shards(chain(first, chunks), staging, pool, workers, recipe, samples_per_shard, len(words))
        summary = summarize(output, len(words), sequence_length, staging.groups())
        check_samples_made(summary, files, held_out)
        staging.publish(asdict(summary))
    return summary


def file_state(path: str) -> List:
    """What tells whether a file is still the one that a stopped run has read."""
    if path == PYTHON:
        return [path, sys.version]
    state = os.stat(path)
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def begun_vocab(staging: Staging) -> Optional[List[str]]:
    """The vocabulary that a stopped run has trained."""
    path = os.path.join(staging.data, "vocab.txt")
    return read_vocab(path) if os.path.exists(path) else None


def make_shards(
    chunks: Iterable[Tuple[int, List[Document]]],
    staging: Staging,
    pool,
    workers: int,
    recipe: Recipe,
    samples_per_shard: int,
    vocab_size: int,
) -> None:
    """Makes what is still missing of the parts of each group, then of its shards."""
    done, number = staging.groups(), -1
    parts = Queue(pool, workers + 2)
    bytes_of_sample = sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in layout(recipe.sequence_length, recipe.mask_tokens, vocab_size).values()
    )
    shards = Queue(pool, max(1, min(workers, SHARDS_BYTES // (samples_per_shard * bytes_of_sample))))

    def end_group():
        parts.wait()
        group, counts = len(done), number % GROUP_CHUNKS + 1
        done.append(deal(staging, group, counts, done, samples_per_shard, shards, recipe.seed))

    for number, (split, texts) in enumerate(chunks):
        group, place = divmod(number, GROUP_CHUNKS)
        if group >= len(done) and not os.path.exists(staging.part(number)):
            parts.add(
                {"do": "make_part", "path": staging.part(number), "number": number, "split": split, "documents": texts}
            )
        if group >= len(done) and place == GROUP_CHUNKS - 1:
            end_group()
    if number >= 0 and number // GROUP_CHUNKS >= len(done):
        end_group()


class Queue:
    """At most `most` tasks under way at a time."""

    def __init__(self, pool, most: int):
        self.pool, self.most, self.pending = pool, most, deque()

    def add(self, task: Dict) -> None:
        if len(self.pending) >= self.most:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(task))

    def wait(self) -> None:
        while self.pending:
            self.pending.popleft().result()


def deal(
    staging: Staging, group: int, chunks: int, done: Sequence[Dict], samples_per_shard: int, queue: Queue, seed: int
) -> Dict:
    """Deals the samples of a group's parts over shards of about equal size; gives the group's record.

    Each part is in random order, so that its k-th stretch is a random share of it.
    """
    paths = [staging.part(group * GROUP_CHUNKS + place) for place in range(chunks)]
    record = {"parts": [read_part_counts(path) for path in paths], "shards": [0, 0]}
    for split, name in enumerate(SHARD_NAMES):
        own = [(path, counts["samples"]) for path, counts in zip(paths, record["parts"]) if counts["split"] == split]
        shards = -(-sum(samples for _, samples in own) // samples_per_shard)
        before = sum(earlier["shards"][split] for earlier in done)
        for shard in range(shards):
            path = os.path.join(staging.data, name % (before + shard))
            if not os.path.exists(path):
                pieces = [(part, shard * samples // shards, (shard + 1) * samples // shards) for part, samples in own]
                queue.add({"do": "make_shard", "path": path, "pieces": pieces, "seed": [seed, split, before + shard]})
        record["shards"][split] = shards
    queue.wait()
    staging.end_group(group, record, paths)
    return record


def summarize(output: str, vocab_size: int, sequence_length: int, groups: Sequence[Dict]) -> Summary:
    summary, last = Summary(output, vocab_size=vocab_size), [None, None]
    for part in chain.from_iterable(group["parts"] for group in groups):
        split = part["split"]
        # A long document may go on in the next chunk of its split.
        begun = part["documents"] - (part["first"] is not None and part["first"] == last[split])
        last[split] = last[split] if part["last"] is None else part["last"]
        summary.documents += begun
        summary.held_out_documents += begun if split == HELD_OUT else 0
        for name in (
            "lines",
            "empty_lines",
            "tokens",
            "unknown_tokens",
            "dropped_tokens",
            "not_next_samples",
            "sample_tokens",
        ):
            setattr(summary, name, getattr(summary, name) + part[name])
        summary.train_samples += part["samples"] if split == TRAIN else 0
        summary.held_out_samples += part["samples"] if split == HELD_OUT else 0
    summary.slots = (summary.train_samples + summary.held_out_samples) * sequence_length
    summary.train_shards, summary.held_out_shards = [
        sum(group["shards"][split] for group in groups) for split in (0, 1)
    ]
    return summary


def check_options(
    format,
    sequence_length,
    mask_tokens,
    mask_share,
    masking,
    short_share,
    duplicates,
    held_out,
    samples_per_shard,
    seed,
    workers,
) -> None:
    for name, value, good, expected in [
        ("--format", format, format in FORMATS, " or ".join(FORMATS)),
        ("--sequence-length", sequence_length, 8 <= sequence_length <= 65535, "8 to 65535 tokens"),
        (
            "--mask-tokens",
            mask_tokens,
            1 <= mask_tokens <= sequence_length - 3,
            f"1 to {sequence_length - 3}: the sequence length less [CLS] and two [SEP]",
        ),
        ("--mask-share", mask_share, 0 < mask_share < 1, "a share between 0 and 1, such as 0.15"),
        ("--masking", masking, masking in MASKINGS, " or ".join(MASKINGS)),
        ("--short-share", short_share, 0 <= short_share <= 1, "a share from 0 to 1"),
        ("--duplicates", duplicates, duplicates >= 1, "1 or more"),
        ("--held-out", held_out, 0 <= held_out < 1, "a share of the documents from 0 to less than 1, such as 0.05"),
        ("--samples-per-shard", samples_per_shard, samples_per_shard >= 1, "1 or more"),
        ("--seed", seed, seed >= 0, "0 or more"),
        ("--workers", workers, workers >= 1, "1 or more processes"),
    ]:
        if not good:
            raise InputError(f"{name} is {value}, expected {expected}")


def check_samples_made(summary: Summary, files: Sequence[str], held_out: float) -> None:
    found = (
        f"the text has {summary.documents} documents with a token, of which {summary.held_out_documents} were held out"
    )
    if summary.train_samples + summary.held_out_samples == 0:
        raise InputError(
            f"{', '.join(files)}: no text to make a sample of ({summary.lines} lines, {summary.tokens} "
            "tokens); expected documents of one sentence or paragraph a line"
        )
    if summary.train_samples == 0:
        raise InputError(
            f"--held-out is {held_out:g} and leaves nothing to train on: {found}. Give more documents or a "
            "smaller share"
        )
    if held_out and summary.held_out_samples == 0:
        raise InputError(
            f"--held-out is {held_out:g} and holds nothing out: {found}. Give more documents, a larger share, or 0"
        )


def text_chunks(texts: Iterable[Document], held_out: float, seed: int) -> Iterator[Tuple[int, List[Document]]]:
    """Documents of one split, of about CHUNK_CHARACTERS together, each time with the split."""
    splits = HeldOut(held_out, seed)
    chunks, characters = [[], []], [0, 0]
    for document in texts:
        split = splits.of(document.number)
        chunks[split].append(document)
        characters[split] += sum(map(len, document.lines))
        if characters[split] >= CHUNK_CHARACTERS:
            yield split, chunks[split]
            chunks[split], characters[split] = [], 0
    for split, chunk in enumerate(chunks):
        if chunk:
            yield split, chunk


class HeldOut:
    """Which documents are held out: one at random of every 1/share, so that few documents get their share too."""

    def __init__(self, share: float, seed: int):
        self.share, self.seed = share, seed
        self.stratum, self.chosen = -1, -1

    def of(self, number: int) -> int:
        """HELD_OUT or TRAIN for a document; a function of its number, the share and the seed."""
        if not self.share:
            return TRAIN
        stratum = math.floor((number + 0.5) * self.share)
        if stratum != self.stratum:
            first, end = [math.ceil(bound / self.share - 0.5) for bound in (stratum, stratum + 1)]
            draw = random.Random(f"held out {self.seed} {stratum}").random()
            self.stratum, self.chosen = stratum, first + int(draw * (end - first))
        return HELD_OUT if number == self.chosen else TRAIN


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes a BERT pre-training data set from text: HDF5 shards of masked samples, with their vocabulary.",
        epilog="""examples:
  # phase 1 of the recipe from your own text and bert-base-uncased's vocabulary
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 128 --mask-tokens 20 --output
  shards128/

  # phase 2, with one document in twenty kept for evaluation
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 512 --mask-tokens 76 --held-out 0.05
  \\
      --output shards512/

  # WikiExtractor's output, five times over and masked anew by the loader in each epoch; if killed, the same command
  goes on python -m data.prepare --input 'extracted/*/wiki_*.zst' --format wikiextractor --vocab vocab.txt --duplicates
  5 \\
      --masking dynamic --output shards128/

  # no text at hand: the manual and the docstrings of this Python, with a vocabulary trained on them
  python -m data.prepare --input python --vocab-size 8192 --output shards/

The output folder gets train-00000.h5 and so on, held_out-00000.h5 and so on, vocab.txt, tokenizer.json and
tokenizer_config.json; data/FORMAT.md describes the shards. The same text, options and seed give the same files, on any
number of processes. Until they are whole they are in .NAME.unfinished beside the output folder; what a stopped run has
done there is used when the same command is given again (the text is read up to there, not tokenized). Remove that
folder to begin anew.""",
    )
    option = parser.add_argument
    option(
        "--input",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="UTF-8 text files, plain, .gz or .zst, or globs in quotes; or the word `python` for the English prose that every "
        "Python brings",
    )
    option("--output", required=True, metavar="FOLDER", help="the folder to make; one that holds a data set is refused")
    option(
        "--format",
        default="lines",
        choices=FORMATS,
        help="lines (default): one sentence or paragraph a line, a blank line ends a document. "
        "wikitext: a `= Title =` line begins a document. wikiextractor: what is between <doc ...> and </doc> is a "
        "document, as WikiExtractor writes it. jsonl: a JSON object a line, its field `text` a "
        "document",
    )
    option(
        "--vocab",
        metavar="FILE",
        help="the WordPiece vocabulary, one word a line; without it one is trained on the text",
    )
    option(
        "--vocab-size", type=int, default=30522, help="words of a vocabulary that is trained, at most (default 30522)"
    )
    option("--sequence-length", type=int, default=128, help="tokens of a sample, with [CLS] and [SEP] (default 128)")
    option(
        "--mask-tokens", type=int, default=20, help="masked tokens of a sample, at most (default 20; 76 at length 512)"
    )
    option("--mask-share", type=float, default=0.15, help="share of a sample's tokens to mask (default 0.15)")
    option(
        "--masking",
        default="static",
        choices=MASKINGS,
        help=(
            "static (default): samples are masked here, once. dynamic: the loader masks them, differently in each epoch"
        ),
    )
    option("--whole-word-masking", action="store_true", help="mask all pieces of a word together, or none")
    option(
        "--short-share",
        type=float,
        default=0.1,
        help="share of the samples that are cut shorter at random (default 0.1)",
    )
    option(
        "--duplicates",
        type=int,
        default=1,
        metavar="N",
        help="go over the training text N times, each time cut and masked anew (default 1)",
    )
    option(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the documents that go to held_out-*.h5 instead, for evaluation (default 0)",
    )
    option(
        "--samples-per-shard",
        type=int,
        default=262144,
        help="samples of a shard, about; one is held in memory for each process (default 262144)",
    )
    option("--seed", type=int, default=42, help="of every random choice (default 42)")
    option("--workers", type=int, metavar="N", help="processes that make samples (default: one for every core)")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status: 0, 2 for input that cannot be used, 1 when it stopped, 130 when
    interrupted."""
    options = vars(make_parser().parse_args(arguments))
    try:
        print(prepare(**options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PrepareStopped, OSError) as error:
        print(f"stopped: {error}. The same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {options['output']} is not whole; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
