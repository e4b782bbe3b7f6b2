"""A chunk of text to samples on disk, and many chunks' samples to shuffled shards: the work of `data.prepare`'s
processes.

    chunk of documents -> token ids -> samples, shuffled -> part -> with all parts of its group -> shards, shuffled

A part is a file in the shards' own format that holds one chunk's samples; its `made_by` says what was counted on the
way. What is made depends on the task and the settings only, not on which process makes it or when.
"""

import json
from collections import Counter
from itertools import accumulate, groupby
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import h5py
import numpy as np

from data.masking import Masking, load_choice
from data.preparing.cutting import Chunk, make_samples
from data.preparing.options import PrepareOptions
from data.preparing.splits import TRAIN
from data.samples import Samples
from data.shards import read_samples, write_shard
from data.tokenizer import SPECIAL_TOKENS, TextEncoder, Vocabulary, altered_characters, vocab_sha256

__all__ = ["ChunkMaker", "read_part_counts"]

COUNTED_CHARACTERS = 1 << 18  # of a chunk, to tell what normalisation takes from them
NAMED_CHARACTERS = 5
BATCH_CHARACTERS = 1 << 20  # encoded at a time: the words of a batch are Python objects, some 60 bytes each

NumberedLines = Tuple[int, List[str]]  # a document's number and lines, also as a list from JSON


class ChunkMaker:
    """Makes parts and shards. Its arguments are JSON values, for it may be in a process of its own.

    `vocabulary`: the fields of Vocabulary. `options`: those of PrepareOptions. `choose`: the function that chooses
    tokens to mask, as `data.masking.choice_reference` names it. `made_by`: what the shards say of how they were made.
    """

    def __init__(self, vocabulary: Dict[str, Any], options: Dict[str, Any], choose: str, made_by: Dict[str, Any]):
        self.options, self.made_by = PrepareOptions(**options), made_by
        tokens = vocabulary["tokens"]
        self.vocabulary = Vocabulary(**vocabulary)
        self.encoder = TextEncoder(self.vocabulary)
        self.vocab_size, self.vocab_hash = len(tokens), vocab_sha256(tokens)
        self.special_ids = list(map(tokens.index, SPECIAL_TOKENS))
        units, share, continuations = self.options.units, self.options.mask_share, None
        if units != "tokens":
            continuations = np.array([token.startswith(self.vocabulary.prefix) for token in tokens])
        masking = Masking.of(load_choice(choose), share, self.vocab_size, self.special_ids, continuations)
        self.masking = masking if self.options.masking == "static" else None
        bits = "" if continuations is None else np.packbits(continuations).tobytes().hex()
        self.attributes = {"masking": self.options.masking, "mask_share": share}
        self.attributes.update(special_ids=self.special_ids, continuations=bits)
        if units not in ("tokens", "words"):  # which `continuations` tells apart
            self.attributes["masked_units"] = units

    def do(self, task: Dict[str, Any]) -> None:
        """Does one task: `make_part` or `make_shard`, as its "do" says, with its other entries as arguments."""
        arguments = dict(task)
        getattr(self, arguments.pop("do"))(**arguments)

    def make_part(self, path: str, number: int, split: int, documents: Sequence[NumberedLines]) -> None:
        """Writes chunk `number` of (document number, lines) as a part of `split`."""
        options, seed = self.options, self.options.seed
        chunk, counts = self.encode(documents)
        parts, dropped = [self.empty_samples(0)], 0
        duplicates = options.duplicates if split == TRAIN else 1  # evaluation needs each text once
        for duplicate in range(duplicates if len(chunk.tokens) else 0):
            rng = np.random.default_rng([seed, number, duplicate])
            blocks, dropped = make_samples(chunk, self.special_ids, self.masking, options, rng)
            parts.extend(blocks)
        samples = Samples.concatenate(parts)
        counts.update(
            split=split,
            samples=len(samples),
            dropped_tokens=dropped,
            not_next_samples=int(samples.nsp_labels.sum()),
            sample_tokens=int(samples.lengths.sum(dtype=np.int64)),
        )
        order = np.random.default_rng([seed, number, options.duplicates]).permutation(len(samples))
        write_shard(path, samples.take(order), self.vocab_size, self.vocab_hash, counts)

    def make_shard(
        self, path: str, pieces: Sequence[Tuple[str, int, int]], seed: List[int], altered: Optional[float]
    ) -> None:
        """Writes the shard `path` of (part, first sample, one past the last) `pieces`, shuffled together. `altered` is
        the share of their text's characters that normalisation took something from; None: not known."""
        count = sum(stop - start for _, start, stop in pieces)
        places = np.random.default_rng(seed).permutation(count)
        # Each sample goes to its place as it is read: the shard is in memory once.
        shard, filled = self.empty_samples(count), 0
        for part, start, stop in pieces:
            samples = read_samples(part, start, stop)
            for name, values in vars(samples).items():
                getattr(shard, name)[places[filled : filled + stop - start]] = values
            filled += stop - start
        made_by = {**self.made_by, "altered_characters": altered}
        rest = (self.attributes, 2 if self.options.nsp else 1, self.vocabulary.rules)
        write_shard(path, shard, self.vocab_size, self.vocab_hash, made_by, *rest)

    def empty_samples(self, count: int) -> Samples:
        return Samples.empty(count, self.options.sequence_length, self.options.mask_tokens, self.vocab_size)

    def encode(self, documents: Sequence[NumberedLines]) -> Tuple[Chunk, Dict[str, Any]]:
        """The chunk of the documents that have a token, and counts of documents, lines and tokens.

        `first` and `last` are the numbers of those documents; parts of a long one have the same.
        """
        encoded = [self.encoder.encode([line for _, lines in batch for line in lines]) for batch in batches(documents)]
        tokens, line_sizes = [np.concatenate(arrays) for arrays in zip(*encoded)]
        line_counts = np.array([len(lines) for _, lines in documents])
        sizes = np.add.reduceat(line_sizes, np.cumsum(line_counts) - line_counts)
        numbers = np.array([number for number, _ in documents])[sizes > 0]
        unit_sizes = line_sizes[line_sizes > 0]
        counts = {
            "documents": int((np.diff(numbers, prepend=-1) != 0).sum()),
            "first": int(numbers[0]) if len(numbers) else None,
            "last": int(numbers[-1]) if len(numbers) else None,
            "lines": len(line_sizes),
            "empty_lines": len(line_sizes) - len(unit_sizes),
            "tokens": len(tokens),
            "unknown_tokens": int((tokens == self.special_ids[1]).sum()),
            **self.count_altered([line for _, lines in documents for line in lines]),
        }
        return Chunk(tokens, np.cumsum(unit_sizes) - unit_sizes, np.cumsum([0, *sizes[sizes > 0]])), counts

    def count_altered(self, lines: Sequence[str]) -> Dict[str, Any]:
        """What normalisation takes from every k-th line's characters."""
        counts = Counter("".join(lines[:: 1 + sum(map(len, lines)) // COUNTED_CHARACTERS]))
        altered = altered_characters(self.vocabulary, counts)
        return {
            "characters": sum(count for character, count in counts.items() if not character.isspace()),
            "altered_characters": sum(altered.values()),
            "altered": dict(Counter(altered).most_common(NAMED_CHARACTERS)),
        }


def batches(documents: Sequence[NumberedLines]) -> Iterator[List[NumberedLines]]:
    """Documents of about BATCH_CHARACTERS together."""
    ends = accumulate(sum(map(len, lines)) for _, lines in documents)
    for _, batch in groupby(zip(ends, documents), lambda pair: pair[0] // BATCH_CHARACTERS):
        yield [document for _, document in batch]


def read_part_counts(path: str) -> Dict[str, Any]:
    """What `make_part` counted: split, documents and the first and last one's number, lines, tokens, samples."""
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["made_by"])
