"""Makes a data set from text: `python -m data.prepare --help` tells how.

    text files -> documents -> token ids -> chunks of documents -> samples -> shards

Text is streamed and memory is bounded whatever the corpus's size. The same text, vocabulary, options and seed give the same
files, byte for byte. The data set is built beside the output folder and moved there when it is whole.
"""

import argparse
import contextlib
import glob
import math
import os
import random
import shutil
import sys
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from data.corpus import FORMATS, Document, corpus_bytes, documents, find_files
from data.errors import InputError
from data.samples import Chunk, make_samples
from data.shards import Samples, vocab_sha256, write_shard
from data.tokenizer import TextEncoder, read_vocab, train_vocab, write_tokenizer_files

__all__ = ["Summary", "main", "prepare"]

TRAIN, HELD_OUT = 0, 1
SHARD_NAMES = ("train-%05d.h5", "held_out-%05d.h5")
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")

BATCH_CHARACTERS = 1 << 21
CHUNK_TOKENS = 1 << 22
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
        dropped = "documents of one token without another document to pair them with" if self.dropped_tokens else "none cut off"
        return "\n".join([
            "documents   %s, of which %s held out" % (thousands(self.documents), thousands(self.held_out_documents)),
            "lines       %s, and %s without a token" % (thousands(self.lines - self.empty_lines), thousands(self.empty_lines)),
            "tokens      %s used, %s dropped (%s), %.2f %% [UNK]" % (
                thousands(self.tokens - self.dropped_tokens), thousands(self.dropped_tokens), dropped,
                100 * self.unknown_tokens / max(1, self.tokens)),
            "samples     %s to train on in %d shards, %s held out in %d" % (
                thousands(self.train_samples), self.train_shards, thousands(self.held_out_samples), self.held_out_shards),
            "NSP         %.1f %% of the second segments do not follow the first" % (100 * self.not_next_samples / samples),
            "padding     %.1f %% of the token slots" % (100 - 100 * self.sample_tokens / self.slots),
            "vocabulary  %s words" % thousands(self.vocab_size),
            "written to  %s" % self.output,
        ])


def thousands(count: int) -> str:
    return format(count, ",")


def prepare(input: Sequence[str], output: str, format: str = "lines", vocab: Optional[str] = None, vocab_size: int = 30522,
            sequence_length: int = 128, mask_tokens: int = 20, mask_share: float = 0.15, short_share: float = 0.1,
            duplicates: int = 1, held_out: float = 0.0, samples_per_shard: int = 262144, seed: int = 42,
            progress: bool = True) -> Summary:
    """Makes the data set `output`: train-*.h5, held_out-*.h5 if asked for, vocab.txt, tokenizer.json, tokenizer_config.json.

    The arguments are the command's options. Raises InputError for anything that cannot be used: an option, a file that is
    missing or not UTF-8, a text without samples, a vocabulary, an output folder that holds a data set. Nothing is written then.
    """
    check_options(format, sequence_length, mask_tokens, mask_share, short_share, duplicates, held_out, samples_per_shard, seed)
    files = find_files(input)
    check_output(output, vocab)
    words = None if vocab is None else read_vocab(vocab)
    total = corpus_bytes(files)

    def read(purpose):
        with tqdm(total=total, unit="B", unit_scale=True, desc=purpose, disable=not progress) as bar:
            yield from documents(files, format, bar.update)

    with staged(output) as folder:
        if words is None:
            stride = -(-total // VOCAB_TEXT_BYTES) or 1
            words = train_vocab(
                lambda: (document.lines for document in read("vocabulary") if document.number % stride == 0), vocab_size)
        write_tokenizer_files(folder, words)
        made_by = {"command": "data.prepare", "input": [os.path.basename(path) for path in files], "format": format,
                   "mask_share": mask_share, "short_share": short_share, "duplicates": duplicates, "held_out": held_out,
                   "seed": seed}
        writers = [ShardWriter(os.path.join(folder, name), samples_per_shard, words, made_by, [seed, split])
                   for split, name in enumerate(SHARD_NAMES)]
        summary = Summary(output, vocab_size=len(words))
        for number, (split, chunk) in enumerate(encoded_chunks(read("samples"), TextEncoder(words), held_out, seed, summary)):
            # Evaluation needs each held-out text once.
            for duplicate in range(duplicates if split == TRAIN else 1):
                rng = np.random.default_rng([seed, number, duplicate])
                blocks, dropped = make_samples(chunk, words, sequence_length, mask_tokens, mask_share, short_share, rng)
                summary.dropped_tokens += dropped if duplicate == 0 else 0
                for samples in blocks:
                    writers[split].add(samples)
                    summary.not_next_samples += int(samples.nsp_labels.sum())
                    summary.sample_tokens += int(samples.lengths.sum(dtype=np.int64))
                    summary.slots += samples.input_ids.size
        for writer in writers:
            writer.close()
        summary.train_samples, summary.held_out_samples = [writer.written for writer in writers]
        summary.train_shards, summary.held_out_shards = [writer.shards for writer in writers]
        check_samples_made(summary, files, held_out)
    return summary


def check_options(format, sequence_length, mask_tokens, mask_share, short_share, duplicates, held_out, samples_per_shard,
                  seed) -> None:
    for name, value, good, expected in [
            ("--format", format, format in FORMATS, " or ".join(FORMATS)),
            ("--sequence-length", sequence_length, 8 <= sequence_length <= 65535, "8 to 65535 tokens"),
            ("--mask-tokens", mask_tokens, 1 <= mask_tokens <= sequence_length - 3,
             "1 to %d: the sequence length less [CLS] and two [SEP]" % (sequence_length - 3)),
            ("--mask-share", mask_share, 0 < mask_share < 1, "a share between 0 and 1, such as 0.15"),
            ("--short-share", short_share, 0 <= short_share <= 1, "a share from 0 to 1"),
            ("--duplicates", duplicates, duplicates >= 1, "1 or more"),
            ("--held-out", held_out, 0 <= held_out < 1, "a share of the documents from 0 to less than 1, such as 0.05"),
            ("--samples-per-shard", samples_per_shard, samples_per_shard >= 1, "1 or more"),
            ("--seed", seed, seed >= 0, "0 or more")]:
        if not good:
            raise InputError("%s is %s, expected %s" % (name, value, expected))


def check_output(output: str, vocab: Optional[str]) -> None:
    """Refuses a folder in which something would be overwritten, but for the vocabulary itself lying there."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError("%s: is a file, expected a folder to make; give another --output" % output)
    shard_patterns = [os.path.join(glob.escape(output), name.replace("%05d", "*")) for name in SHARD_NAMES]
    taken = [path for pattern in shard_patterns for path in sorted(glob.glob(pattern))]
    taken += [path for path in (os.path.join(output, name) for name in TOKENIZER_FILES)
              if os.path.exists(path) and not (vocab and os.path.exists(vocab) and os.path.samefile(path, vocab))]
    if taken:
        raise InputError("%s: holds a data set already (%s); nothing is overwritten. Give another --output, or remove that "
                         "folder first" % (output, os.path.basename(taken[0])))


def check_samples_made(summary: Summary, files: Sequence[str], held_out: float) -> None:
    found = "the text has %d documents with a token, of which %d were held out" % (summary.documents, summary.held_out_documents)
    if summary.train_samples + summary.held_out_samples == 0:
        raise InputError("%s: no text to make a sample of (%d lines, %d tokens); expected documents of one sentence or paragraph "
                         "a line" % (", ".join(files), summary.lines, summary.tokens))
    if summary.train_samples == 0:
        raise InputError("--held-out is %g and leaves nothing to train on: %s. Give more documents or a smaller share" % (
            held_out, found))
    if held_out and summary.held_out_samples == 0:
        raise InputError("--held-out is %g and holds nothing out: %s. Give more documents, a larger share, or 0" % (
            held_out, found))


@contextlib.contextmanager
def staged(output: str) -> Iterator[str]:
    """A folder to fill, whose files are moved into `output` at the end, or removed without a trace if an exception ends it."""
    target = os.path.realpath(output)
    existed = os.path.isdir(target)
    parent = target
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    folder = os.path.join(parent, ".%s.unfinished-%d" % (os.path.basename(target), os.getpid()))
    try:
        os.mkdir(folder)
    except OSError as error:
        raise InputError("%s: cannot be written (%s); give another --output" % (output, error.strerror))
    try:
        yield folder
        if existed:
            for name in sorted(os.listdir(folder)):
                os.replace(os.path.join(folder, name), os.path.join(target, name))
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def encoded_chunks(texts: Iterable[Document], encoder: TextEncoder, held_out: float, seed: int,
                   summary: Summary) -> Iterator[Tuple[int, Chunk]]:
    """Chunks of documents, each with its split; counts documents, lines and tokens into `summary`."""
    splits = HeldOut(held_out, seed)
    builders = [ChunkBuilder(), ChunkBuilder()]
    unknown = encoder.tokenizer.token_to_id("[UNK]")
    latest = -1
    for batch in text_batches(texts):
        ids, counts = encoder.encode([line for document in batch for line in document.lines])
        summary.lines += len(counts)
        summary.empty_lines += int((counts == 0).sum())
        summary.tokens += len(ids)
        summary.unknown_tokens += int((ids == unknown).sum())
        line, token = 0, 0
        for document in batch:
            units = counts[line:line + len(document.lines)]
            size = int(units.sum())
            if size:
                split = splits.of(document.number)
                if document.number != latest:
                    summary.documents += 1
                    summary.held_out_documents += split == HELD_OUT
                    latest = document.number
                builders[split].add(ids[token:token + size], units[units > 0])
                if builders[split].size >= CHUNK_TOKENS:
                    yield split, builders[split].chunk()
                    builders[split] = ChunkBuilder()
            line, token = line + len(document.lines), token + size
    for split, builder in enumerate(builders):
        if builder.size:
            yield split, builder.chunk()


def text_batches(texts: Iterable[Document]) -> Iterator[List[Document]]:
    batch, characters = [], 0
    for document in texts:
        batch.append(document)
        characters += sum(map(len, document.lines))
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
            draw = random.Random("held out %d %d" % (self.seed, stratum)).random()
            self.stratum, self.chosen = stratum, first + int(draw * (end - first))
        return HELD_OUT if number == self.chosen else TRAIN


class ChunkBuilder:
    """Collects documents until there are enough of them for a chunk."""

    def __init__(self):
        self.tokens, self.unit_counts, self.sizes, self.size = [], [], [], 0

    def add(self, tokens: np.ndarray, unit_counts: np.ndarray) -> None:
        # Copies, so that a slice does not keep its whole batch in memory.
        self.tokens.append(tokens.copy())
        self.unit_counts.append(unit_counts)
        self.sizes.append(len(tokens))
        self.size += len(tokens)

    def chunk(self) -> Chunk:
        units = np.concatenate(self.unit_counts)
        return Chunk(np.concatenate(self.tokens), np.cumsum(units) - units, np.cumsum([0] + self.sizes))


class ShardWriter:
    """Writes samples to numbered shards, each shuffled, of `limit` samples but for the last."""

    def __init__(self, path: str, limit: int, words: Sequence[str], made_by: Dict, seed: List[int]):
        self.path, self.limit, self.made_by, self.seed = path, limit, made_by, seed
        self.vocab_size, self.vocab_hash = len(words), vocab_sha256(words)
        self.parts, self.held, self.written, self.shards = [], 0, 0, 0

    def add(self, samples: Samples) -> None:
        self.parts.append(samples)
        self.held += len(samples)
        while self.held >= self.limit:
            self.write(self.limit)

    def close(self) -> None:
        if self.held:
            self.write(self.held)

    def write(self, count: int) -> None:
        held = Samples.concatenate(self.parts)
        self.parts = [held.take(np.arange(count, self.held))]
        order = np.random.default_rng(self.seed + [self.shards]).permutation(count)
        write_shard(self.path % self.shards, held.take(order), self.vocab_size, self.vocab_hash, self.made_by)
        self.held, self.written, self.shards = self.held - count, self.written + count, self.shards + 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes a BERT pre-training data set from text: HDF5 shards of masked samples, with their vocabulary.",
        epilog="""examples:
  # phase 1 of the recipe from your own text and bert-base-uncased's vocabulary
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 128 --mask-tokens 20 --output shards128/

  # phase 2, with one document in twenty kept for evaluation
  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length 512 --mask-tokens 76 --held-out 0.05 \\
      --output shards512/

  # no text at hand: the manual and the docstrings of this Python, with a vocabulary trained on them
  python -m data.prepare --input python --vocab-size 8192 --output shards/

The output folder gets train-00000.h5 and so on, held_out-00000.h5 and so on, vocab.txt, tokenizer.json and
tokenizer_config.json. The same text, options and seed give the same files.""")
    option = parser.add_argument
    option("--input", nargs="+", required=True, metavar="TEXT",
           help="UTF-8 text files, or globs in quotes; or the word `python` for the English prose that every Python brings")
    option("--output", required=True, metavar="FOLDER", help="the folder to make; one that holds a data set is refused")
    option("--format", default="lines", choices=FORMATS,
           help="lines (default): one sentence or paragraph a line, a blank line ends a document. "
                "wikitext: a `= Title =` line begins a document")
    option("--vocab", metavar="FILE", help="the WordPiece vocabulary, one word a line; without it one is trained on the text")
    option("--vocab-size", type=int, default=30522, help="words of a vocabulary that is trained, at most (default 30522)")
    option("--sequence-length", type=int, default=128, help="tokens of a sample, with [CLS] and [SEP] (default 128)")
    option("--mask-tokens", type=int, default=20, help="masked tokens of a sample, at most (default 20; 76 at length 512)")
    option("--mask-share", type=float, default=0.15, help="share of a sample's tokens to mask (default 0.15)")
    option("--short-share", type=float, default=0.1, help="share of the samples that are cut shorter at random (default 0.1)")
    option("--duplicates", type=int, default=1, metavar="N",
           help="go over the training text N times, each time cut and masked anew (default 1)")
    option("--held-out", type=float, default=0.0, metavar="SHARE",
           help="share of the documents that go to held_out-*.h5 instead, for evaluation (default 0)")
    option("--samples-per-shard", type=int, default=262144, help="samples of a shard (default 262144; one is held in memory)")
    option("--seed", type=int, default=42, help="of every random choice (default 42)")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Gives its exit status: 0, 2 for input that cannot be used (one line on stderr), 130 when interrupted."""
    options = vars(make_parser().parse_args(arguments))
    try:
        print(prepare(**options))
    except InputError as error:
        print("error: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: %s was not made" % options["output"], file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
