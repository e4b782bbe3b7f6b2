"""A chunk of text to samples on disk, and many chunks' samples to shuffled shards: the work of `data.prepare`'s
processes.

    chunk of documents -> token ids -> samples, shuffled -> part -> with all parts of its group -> shards, shuffled

A part is a file in the shards' own format that holds one chunk's samples; its `made_by` says what was counted on the
way. What is made depends on the task and the recipe only, not on which process makes it or when.
"""

import json
from dataclasses import dataclass
from typing import Dict, Iterator, List, Sequence, Tuple

import h5py
import numpy as np

from data.masking import CHOICES, Masking
from data.preparing.cutting import Chunk, make_samples
from data.samples import Samples
from data.shards import read_samples, write_shard
from data.tokenizer import SPECIAL_WORDS, TextEncoder, vocab_sha256

__all__ = ["ChunkMaker", "Recipe", "read_part_counts"]

TRAIN, HELD_OUT = 0, 1
BATCH_CHARACTERS = 1 << 20  # encoded at a time: the words of a batch are Python objects, some 60 bytes each


@dataclass
class Recipe:
    """What is done to the text; the fields are `data.prepare`'s options."""

    sequence_length: int
    mask_tokens: int
    mask_share: float
    short_share: float
    duplicates: int
    masking: str
    whole_word_masking: bool
    seed: int
    made_by: Dict
    """what the shards say of how they were made"""


class ChunkMaker:
    """Makes parts and shards, with a vocabulary's words and a recipe."""

    def __init__(self, words: Sequence[str], recipe: Recipe):
        self.recipe = recipe
        self.encoder = TextEncoder(words)
        self.vocab_size, self.vocab_hash = len(words), vocab_sha256(words)
        ids = {word: number for number, word in enumerate(words)}
        self.special_ids = [ids[word] for word in SPECIAL_WORDS]
        continues = None
        if recipe.whole_word_masking:
            continues = np.fromiter((word.startswith("##") for word in words), bool, len(words))
        units = "words" if recipe.whole_word_masking else "tokens"
        self.how = Masking.of(CHOICES[units], recipe.mask_share, len(words), self.special_ids, continues)
        self.masking = {
            "masking": recipe.masking,
            "mask_share": recipe.mask_share,
            "masked_units": units,
            "special_ids": self.special_ids,
            "continuations": "" if continues is None else np.packbits(continues).tobytes().hex(),
        }

    def do(self, task: Dict) -> None:
        """Does one task: `make_part` or `make_shard`, as its "do" says, with its other entries as arguments."""
        arguments = dict(task)
        {"make_part": self.make_part, "make_shard": self.make_shard}[arguments.pop("do")](**arguments)

    def make_part(self, path: str, number: int, split: int, documents: Sequence[Tuple[int, List[str]]]) -> None:
        """Writes chunk `number` of (document number, lines) as a part of `split`."""
        recipe = self.recipe
        counts = {
            "split": split,
            "documents": 0,
            "first": None,
            "last": None,
            "lines": 0,
            "empty_lines": 0,
            "tokens": 0,
            "unknown_tokens": 0,
            "dropped_tokens": 0,
            "not_next_samples": 0,
            "sample_tokens": 0,
        }
        chunk, parts = self.encode(documents, counts), [self.no_samples()]
        # Evaluation needs each held-out text once.
        for duplicate in range(recipe.duplicates if split == TRAIN else 1):
            if counts["tokens"]:
                blocks, dropped = make_samples(
                    chunk,
                    self.special_ids,
                    self.how if recipe.masking == "static" else None,
                    recipe.sequence_length,
                    recipe.mask_tokens,
                    recipe.short_share,
                    np.random.default_rng([recipe.seed, number, duplicate]),
                )
                counts["dropped_tokens"] += dropped if duplicate == 0 else 0
                parts.extend(blocks)
        samples = Samples.concatenate(parts)
        counts.update(
            samples=len(samples),
            not_next_samples=int(samples.nsp_labels.sum()),
            sample_tokens=int(samples.lengths.sum(dtype=np.int64)),
        )
        order = np.random.default_rng([recipe.seed, number, recipe.duplicates]).permutation(len(samples))
        write_shard(path, samples.take(order), self.vocab_size, self.vocab_hash, counts)

    def make_shard(self, path: str, pieces: Sequence[Tuple[str, int, int]], seed: List[int]) -> None:
        """Writes the shard `path` of (part, first sample, one past the last) `pieces`, shuffled together."""
        count = sum(stop - start for _, start, stop in pieces)
        places = np.random.default_rng(seed).permutation(count)
        # Each sample goes to its place as it is read: the shard is in memory once.
        shard = Samples.empty(count, self.recipe.sequence_length, self.recipe.mask_tokens, self.vocab_size)
        filled = 0
        for part, start, stop in pieces:
            samples = read_samples(part, start, stop)
            for name, values in vars(samples).items():
                getattr(shard, name)[places[filled : filled + stop - start]] = values
            filled += stop - start
        write_shard(path, shard, self.vocab_size, self.vocab_hash, self.recipe.made_by, self.masking)

    def no_samples(self) -> Samples:
        return Samples.empty(0, self.recipe.sequence_length, self.recipe.mask_tokens, self.vocab_size)

    def encode(self, documents: Sequence, counts: Dict) -> Chunk:
        """The chunk of the documents that have a token; counts documents, lines and tokens."""
        tokens, units, sizes = [], [], []
        unknown = self.special_ids[1]
        for batch in batches(documents):
            ids, line_sizes = self.encoder.encode([line for _, lines in batch for line in lines])
            counts["lines"] += len(line_sizes)
            counts["empty_lines"] += int((line_sizes == 0).sum())
            counts["tokens"] += len(ids)
            counts["unknown_tokens"] += int((ids == unknown).sum())
            tokens.append(ids)
            line = 0
            for number, lines in batch:
                own = line_sizes[line : line + len(lines)]
                line += len(lines)
                size = int(own.sum())
                if size:
                    units.append(own[own > 0])
                    sizes.append(size)
                    counts["documents"] += number != counts["last"]
                    counts["first"] = number if counts["first"] is None else counts["first"]
                    counts["last"] = number
        unit_sizes = np.concatenate(units) if units else np.empty(0, np.int64)
        return Chunk(np.concatenate(tokens), np.cumsum(unit_sizes) - unit_sizes, np.cumsum([0] + sizes))


def batches(documents: Sequence) -> Iterator[List]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document[1]))
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def read_part_counts(path: str) -> Dict:
    """What `make_part` counted: split, documents and the first and last one's number, lines, tokens, samples."""
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["made_by"])
