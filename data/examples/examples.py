"""Labelled examples in memory, tokenized, and the batches of rows that they make.

Shape letters: N examples, C sequences of an example (1, but where one of several is to be chosen), T tokens of all,
K predictions of all; R rows, L token slots of a row, P prediction slots of a row, S examples of a row.

A batch has the fields of data/rows.py that the model takes, [R, L], and those of one target:

    positions [R, P] or [R, P, C] int32   the token slots that a prediction is made at
    labels    [R, P] or [R, P, 2]         int32, or float32 of a regression: what is right
    weights   [R, P] float32              they sum to 1 over a global batch

Each sequence of a row has a number of its own in `sample_ids`: it sees itself alone.
"""

from dataclasses import dataclass, field
from typing import Any, List, NamedTuple, Optional, Tuple

import numpy as np

from data.packing import Packing, largest_prefix, one_a_row, pack
from data.rows import WHOLE, Arrays, Layout, Part, Target, rank_of_rows

__all__ = ["LABELS", "ExampleBatch", "ExampleShape", "Examples", "make_batch", "ranges"]

LABELS = Target("labels", "positions", "weights")


@dataclass
class Examples:
    """N examples; a prediction is one thing that is learned of an example."""

    input_ids: np.ndarray
    """[T] int32, the tokens of all sequences end to end, those of an example after each other"""
    token_type_ids: np.ndarray
    """[T] int32"""
    sequence_lengths: np.ndarray
    """[N, C] int64, tokens of each sequence"""
    counts: np.ndarray
    """[N] int64, how many predictions each example has"""
    positions: np.ndarray
    """[K] or [K, C] int32: the tokens that a prediction is made at, counted from its example's first"""
    labels: np.ndarray
    """[K] or [K, 2]"""
    records: List[Any] = field(default_factory=list)
    """What a task needs of each example to score it and to report on it."""
    cut: int = 0
    """How many were longer than they may be."""

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, tokens of each example"""
        return self.sequence_lengths.sum(axis=1)


class ExampleShape(NamedTuple):
    """What a row holds at most."""

    tokens: int
    """L: C times the sequence length"""
    slots: int
    """P: as many as examples, or as tokens where each word has a label"""
    samples: int
    """S"""
    position: Tuple[int, ...] = ()
    """of one position: (C,) where one of C is to be chosen"""
    label: Tuple[int, ...] = ()
    """of one label: (2,) where it is a start and an end"""
    label_type: type = np.int32

    def layout(self, rows: int) -> Layout:
        """Of a batch of `rows` rows."""
        tokens, slots = (rows, self.tokens), (rows, self.slots)
        names = ("input_ids", "token_type_ids", "position_ids", "sample_ids")
        return {
            **dict.fromkeys(names, (tokens, np.int32)),
            LABELS.positions: ((*slots, *self.position), np.int32),
            LABELS.labels: ((*slots, *self.label), self.label_type),
            LABELS.weights: (slots, np.float32),
        }


class ExampleBatch(NamedTuple):
    """The rows of a batch, and what is in them."""

    arrays: Arrays
    examples: np.ndarray
    """[n] which examples, row after row, in the order of their places in a row"""
    rows: int
    """of all parts together"""
    predictions: int
    """of all parts together"""


def make_batch(
    examples: Examples,
    chosen: np.ndarray,
    shape: ExampleShape,
    packing: str = "samples",
    rows: Optional[int] = None,
    part: Part = WHOLE,
) -> Tuple[ExampleBatch, int]:
    """The batch of the examples `chosen` [n], or of one `part` of its rows; and how many it took of them.

    `packing`: off, samples or rows, as data.loading.loader.LoaderSettings has it; with "rows" there are `rows`, into
    which as many as fit go.
    """
    lengths, counts = examples.lengths[chosen], examples.counts[chosen]
    if packing == "rows":
        assert rows is not None
        placed = largest_prefix(lengths, counts, rows, *shape[:3])
    else:
        placed = one_a_row(len(chosen)) if packing == "off" else pack(lengths, counts, *shape[:3])
        rows = placed.rows
    taken = len(placed.row)
    lengths, counts, chosen = lengths[:taken], counts[:taken], chosen[:taken]
    ranks = rank_of_rows(np.bincount(placed.row, lengths, minlength=rows).astype(np.int64), part.size)
    own_rows = np.flatnonzero(ranks == part.rank)
    order = np.lexsort((placed.place, placed.row))
    order = order[ranks[placed.row[order]] == part.rank]
    placed = placed.take(order)._replace(row=np.searchsorted(own_rows, placed.row[order]))
    arrays = fill(examples, chosen[order], placed, shape.layout(len(own_rows)))
    predictions = int(counts.sum())
    arrays[LABELS.weights] *= np.float32(1 / max(1, predictions))
    return ExampleBatch(arrays, chosen[order], rows, predictions), taken


def fill(examples: Examples, chosen: np.ndarray, placed: Packing, layout: Layout) -> Arrays:
    """Writes the `chosen` where they are placed; weights are 0 and 1."""
    batch: Arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    (_, length), (_, slots) = batch["input_ids"].shape, batch[LABELS.weights].shape
    lengths, counts, of_sequences = examples.lengths, examples.counts, examples.sequence_lengths[chosen]
    source = ranges((np.cumsum(lengths) - lengths)[chosen], lengths[chosen])
    place = ranges(placed.row * length + placed.start, lengths[chosen])
    batch["input_ids"].reshape(-1)[place] = examples.input_ids[source]
    batch["token_type_ids"].reshape(-1)[place] = examples.token_type_ids[source]
    batch["position_ids"].reshape(-1)[place] = ranges(np.zeros(of_sequences.size, np.int64), of_sequences.ravel())
    numbers = 1 + placed.place[:, None] * of_sequences.shape[1] + np.arange(of_sequences.shape[1])
    batch["sample_ids"].reshape(-1)[place] = np.repeat(numbers.ravel(), of_sequences.ravel())
    source = ranges((np.cumsum(counts) - counts)[chosen], counts[chosen])
    place = ranges(placed.row * slots + placed.mask_start, counts[chosen])
    start = np.repeat(placed.start, counts[chosen])
    positions = examples.positions[source] + start.reshape(-1, *[1] * (examples.positions.ndim - 1))
    for name, values in ((LABELS.positions, positions), (LABELS.labels, examples.labels[source])):
        batch[name].reshape(-1, *values.shape[1:])[place] = values
    batch[LABELS.weights].reshape(-1)[place] = 1
    return batch


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each start on, so many of each: ranges([5, 0], [2, 3]) is [5, 6, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)
