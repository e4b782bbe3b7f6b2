"""Rows: the batch format of the graph, on every device.

Shape letters: R rows, L token slots of a row, M mask slots of a row, S samples of a row; T tokens, N samples in all.

    input_ids, token_type_ids, position_ids, sample_ids [R, L] int32; sample_ids: 0 = padding, 1..S = which sample
    mlm_positions, mlm_labels [R, M] int32, mlm_weights [R, M] float32
    cls_positions, nsp_labels [R, S] int32, nsp_weights [R, S] float32

The weights of a global batch sum to 1 over its masked tokens and to 1 over its samples, so that summing the weighted
losses over any cut into micro-batches gives the mean over the global batch, and its gradient.
"""

from functools import lru_cache
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.packing import Packing, pack
from data.samples import Samples

__all__ = ["MLM", "NSP", "WHOLE", "Arrays", "Layout", "Part", "RowShape", "Target", "fill_packed", "fill_unpacked"]
__all__ += ["normalize_weights", "packed_batch", "rank_of_rows", "unpacked_batch", "unpad", "weight_counts"]

TOKEN_FIELDS = ("input_ids", "token_type_ids", "position_ids")

Arrays = Dict[str, np.ndarray]
Layout = Dict[str, Tuple[Tuple[int, ...], type]]
"""Name -> (shape, dtype) of each array of a batch."""


class RowShape(NamedTuple):
    """What a row holds at most."""

    tokens: int
    """L, the sequence length"""
    mask_slots: int
    """M"""
    samples: int
    """S"""

    @staticmethod
    def of(sequence_length: int, mask_tokens: int, samples_per_row: int = 1) -> "RowShape":
        """Of samples of up to `mask_tokens` masked tokens; each further sample adds a slot, as 15 % are rounded up."""
        return RowShape(sequence_length, mask_tokens + samples_per_row - 1, samples_per_row)

    def layout(self, rows: int) -> Layout:
        """Of a batch of `rows` rows."""
        tokens, masks, samples = [(rows, slots) for slots in self]
        return {
            "input_ids": (tokens, np.int32),
            "token_type_ids": (tokens, np.int32),
            "position_ids": (tokens, np.int32),
            "sample_ids": (tokens, np.int32),
            "mlm_positions": (masks, np.int32),
            "mlm_labels": (masks, np.int32),
            "mlm_weights": (masks, np.float32),
            "cls_positions": (samples, np.int32),
            "nsp_labels": (samples, np.int32),
            "nsp_weights": (samples, np.float32),
        }


class Part(NamedTuple):
    """Which of the parts of a global batch, that together have each row once, the one with this rank is."""

    rank: int = 0
    size: int = 1

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Its rows, in ascending order; `tokens` [R] are the tokens of each row."""
        return np.flatnonzero(rank_of_rows(tokens, self.size) == self.rank)

    def most_rows(self, rows: int) -> int:
        """How many it has at most of a global batch of so many."""
        return -(-rows // self.size)

    def of(self, batch: Arrays) -> Arrays:
        """Its rows of a global batch."""
        if self.size == 1:
            return batch
        rows = self.rows(np.count_nonzero(batch["sample_ids"], axis=1))
        return {name: array[rows] for name, array in batch.items()}


WHOLE = Part()


def rank_of_rows(tokens: np.ndarray, size: int) -> np.ndarray:
    """[R] int: which of `size` parts each row belongs to; `tokens` [R] are the tokens of each, below 65,536.

    The parts' numbers of tokens differ by the longest row's at most: the rows, longest first, go to the parts in turn,
    forwards and backwards (0 1 2 2 1 0 0 ...).
    """
    if size == 1:
        return np.zeros(len(tokens), np.int64)
    turn = np.arange(len(tokens)) % (2 * size)
    ranks = np.empty(len(tokens), np.int64)
    order = np.argsort(np.uint16(65535) - tokens.astype(np.uint16), kind="stable")  # of 16 bits: a radix sort
    ranks[order] = np.minimum(turn, 2 * size - 1 - turn)
    return ranks


class Target(NamedTuple):
    """The fields of a batch that say what is to be predicted where, and how much it counts."""

    labels: str
    positions: str
    weights: str
    used: str = ""
    """Of rows: the field that names the slots whose weight is not 0, so that no others are computed."""


MLM = Target("mlm_labels", "mlm_positions", "mlm_weights", used="mlm_used")
NSP = Target("nsp_labels", "cls_positions", "nsp_weights")


def fill_unpacked(batch: Arrays, samples: Samples) -> None:
    """Writes R checked samples, one a row, into the arrays of `batch`, R rows with S = 1.

    Weights become 1 for each masked token and sample; `normalize_weights` makes them a global batch's.
    """
    sequence_length, mask_slots = samples.input_ids.shape[1], samples.mlm_positions.shape[1]
    inside, types = batch["sample_ids"], batch["token_type_ids"]
    batch["input_ids"][:] = samples.input_ids
    copy_rows(filled_slots(sequence_length), samples.lengths, inside)
    copy_rows(filled_slots(sequence_length), samples.first_lengths, types)
    np.subtract(inside, types, out=types)
    copy_rows(slot_positions(sequence_length), samples.lengths, batch["position_ids"])
    batch["mlm_positions"][:] = samples.mlm_positions
    batch["mlm_labels"][:] = samples.mlm_labels
    batch["mlm_weights"][:] = filled_slots(mask_slots)[samples.mlm_counts]
    batch["cls_positions"][:] = 0
    batch["nsp_labels"][:] = samples.nsp_labels[:, None]
    batch["nsp_weights"][:] = 1


def fill_packed(batch: Arrays, samples: Samples, packing: Packing, first_row: int = 0) -> None:
    """Writes checked samples where `packing` puts them: `batch` holds its R rows from `first_row` on.

    The samples come row after row, in the order of their places. Rows without one become padding. Weights become 0 and
    1 as in `fill_unpacked`.
    """
    row, place, start = packing.row - first_row, packing.place, packing.start
    length, slots = samples.input_ids.shape[1], samples.mlm_positions.shape[1]
    filled, used = filled_slots(length), filled_slots(slots)[samples.mlm_counts]
    inside, tokens = filled[samples.lengths], row * length + start
    write_end_to_end(batch["input_ids"], samples.input_ids, tokens)
    write_end_to_end(batch["token_type_ids"], inside - filled[samples.first_lengths], tokens)
    write_end_to_end(batch["position_ids"], slot_positions(length)[samples.lengths], tokens)
    write_end_to_end(batch["sample_ids"], inside * (place + 1).astype(np.int32)[:, None], tokens)
    masks = row * batch["mlm_weights"].shape[1] + packing.mask_start
    write_end_to_end(batch["mlm_positions"], (samples.mlm_positions + start.astype(np.int32)[:, None]) * used, masks)
    write_end_to_end(batch["mlm_labels"], samples.mlm_labels, masks)
    write_end_to_end(batch["mlm_weights"], used, masks)
    for name, value in (("cls_positions", start), ("nsp_labels", samples.nsp_labels), ("nsp_weights", 1)):
        batch[name][:] = 0
        batch[name][row, place] = value


def write_end_to_end(out: np.ndarray, values: np.ndarray, at: np.ndarray) -> None:
    # Each sample is written in its whole width, with the zeros after its end, in the order of `at`: the next one writes
    # over them. So a ragged copy is as fast as a plain one. `flat` has room for the zeros of the last.
    width = values.shape[1]
    flat = np.zeros(out.size + width, out.dtype)
    sliding_window_view(flat, width, writeable=True)[at] = values
    out[:] = flat[: out.size].reshape(out.shape)


def weight_counts(batch: Arrays) -> Dict[str, int]:
    """How many weights are not 0, by the name of their field."""
    return {target.weights: int(np.count_nonzero(batch[target.weights])) for target in (MLM, NSP)}


def normalize_weights(batch: Arrays, counts: Optional[Mapping[str, int]] = None) -> Mapping[str, int]:
    """Turns weights of 0 and 1 into those of a global batch, in place; returns its `weight_counts`, which are to be
    given where `batch` has some of its rows alone."""
    if counts is None:
        counts = weight_counts(batch)
    for name, count in counts.items():
        batch[name] *= np.float32(1 / max(1, count))
    return counts


def unpacked_batch(samples: Samples) -> Arrays:
    """The global batch of these samples, one a row (S = 1)."""
    shape = RowShape.of(samples.input_ids.shape[1], samples.mlm_positions.shape[1])
    batch: Arrays = {name: np.empty(*array) for name, array in shape.layout(len(samples)).items()}
    fill_unpacked(batch, samples)
    normalize_weights(batch)
    return batch


def packed_batch(samples: Samples, samples_per_row: int) -> Arrays:
    """The global batch of these samples, up to `samples_per_row` in a row."""
    shape = RowShape.of(samples.input_ids.shape[1], samples.mlm_positions.shape[1], samples_per_row)
    packing = pack(samples.lengths, samples.mlm_counts, *shape)
    batch: Arrays = {name: np.zeros(*array) for name, array in shape.layout(packing.rows).items()}
    order = np.lexsort((packing.place, packing.row))
    fill_packed(batch, samples.take(order), packing.take(order))
    normalize_weights(batch)
    return batch


def unpad(rows: Arrays, static: bool, targets: Sequence[Target] = (MLM, NSP)) -> Dict[str, Any]:
    """The samples of these rows with their T tokens end to end, for kernels that take samples of any length.

        input_ids, token_type_ids, position_ids [T] int32
        cu_seqlens [N + 1] int32: sample n has the tokens from cu_seqlens[n] up to cu_seqlens[n + 1]
        max_seqlen: an int that no sample's length exceeds
        of each target: positions [K] int32, which are among the T; labels [K] int32; weights [K] float32

    Targets of weight 0 are left out, and so is padding. With `static` padding stays, so that T = R L depends on the
    rows' shape alone: a row's padding is a sample.
    """
    return (static_batch if static else unpadded_batch)(rows, targets)


def unpadded_batch(rows: Arrays, targets: Sequence[Target]) -> Dict[str, Any]:
    inside = rows["sample_ids"].ravel() != 0
    kept, place = np.flatnonzero(inside), np.cumsum(inside) - 1
    starts = place[first_slots(rows["sample_ids"]) & inside]
    return {
        **{name: rows[name].ravel()[kept] for name in TOKEN_FIELDS},
        "cu_seqlens": np.append(starts, len(kept)).astype(np.int32),
        "max_seqlen": rows["sample_ids"].shape[1],
        **target_fields(rows, targets, place),
    }


def static_batch(rows: Arrays, targets: Sequence[Target]) -> Dict[str, Any]:
    count, length = rows["sample_ids"].shape
    starts = np.flatnonzero(first_slots(rows["sample_ids"]))
    return {
        **{name: rows[name].flatten() for name in TOKEN_FIELDS},
        "cu_seqlens": np.append(starts, count * length).astype(np.int32),
        "max_seqlen": length,
        **target_fields(rows, targets, np.arange(count * length)),
    }


def target_fields(rows: Arrays, targets: Sequence[Target], place: np.ndarray) -> Arrays:
    """The fields of the targets, whose positions are the `place` [R L] of their token slots."""
    fields = {}
    for target in targets:
        row, slot = np.nonzero(rows[target.weights])
        positions = rows[target.positions][row, slot]  # [K], or [K, C] where a prediction is made at several tokens
        first = (row * rows["sample_ids"].shape[1]).reshape(-1, *[1] * (positions.ndim - 1))
        fields[target.positions] = place[first + positions].astype(np.int32)
        for name in (target.labels, target.weights):
            fields[name] = rows[name][row, slot]
    return fields


def first_slots(sample_ids: np.ndarray) -> np.ndarray:
    """[R L] bool, whether a sample or a row's padding begins at a slot."""
    ids = sample_ids.ravel()
    first = np.empty(ids.size, bool)
    first[:1], first[1:] = True, ids[1:] != ids[:-1]
    first[:: sample_ids.shape[1]] = True
    return first


@lru_cache(maxsize=None)
def filled_slots(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n has 1 in its first n slots, then 0."""
    return np.tri(slots + 1, slots, -1, dtype=np.int32)


@lru_cache(maxsize=None)
def slot_positions(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n counts 0, 1, .. in its first n slots, then has 0."""
    return filled_slots(slots) * np.arange(slots, dtype=np.int32)


def copy_rows(table: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    # Copying rows of a small table beats comparing and casting; mode "raise" would fill a copy of `out` first.
    np.take(table, index, axis=0, out=out, mode="clip")
