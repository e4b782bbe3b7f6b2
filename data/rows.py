"""Rows: the batch format of the graph, on every device.

Shape letters: R rows, L token slots of a row, M mask slots of a row, S samples of a row.

    input_ids, token_type_ids, position_ids, sample_ids [R, L] int32; sample_ids: 0 = padding, 1..S = which sample of
    the row mlm_positions, mlm_labels [R, M] int32, mlm_weights [R, M] float32 cls_positions, nsp_labels [R, S] int32,
    nsp_weights [R, S] float32

The weights of a global batch sum to 1 over its masked tokens and to 1 over its samples, so that summing the weighted
losses over any cut into micro-batches gives the mean over the global batch, and its gradient.
"""

from functools import lru_cache
from typing import Dict, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.packing import mask_slots_of_row, pack
from data.samples import Samples

__all__ = [
    "batch_layout",
    "unpad",
    "fill_packed",
    "fill_unpacked",
    "packed_batch",
    "unpacked_batch",
    "normalize_weights",
]


def batch_layout(rows: int, sequence_length: int, mask_slots: int, samples_per_row: int) -> Dict[str, tuple]:
    """Name -> (shape, dtype) of each array of a batch."""
    tokens, masks, samples = (rows, sequence_length), (rows, mask_slots), (rows, samples_per_row)
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


def fill_unpacked(batch: Dict[str, np.ndarray], samples: Samples) -> None:
    """Writes R samples that were checked, one a row, into the arrays of `batch`, R rows with S = 1.

    Their weights become 1 for each masked token and each sample; `normalize_weights` makes them the global batch's when all rows
    are there.
    """
    sequence_length, mask_slots = samples.input_ids.shape[1], samples.mlm_positions.shape[1]
    inside, types = batch["sample_ids"], batch["token_type_ids"]
    batch["input_ids"][:] = samples.input_ids
    look_up(filled_slots(sequence_length), samples.lengths, inside)
    look_up(filled_slots(sequence_length), samples.first_lengths, types)
    np.subtract(inside, types, out=types)
    look_up(slot_positions(sequence_length), samples.lengths, batch["position_ids"])
    batch["mlm_positions"][:] = samples.mlm_positions
    batch["mlm_labels"][:] = samples.mlm_labels
    batch["mlm_weights"][:] = filled_slots(mask_slots)[samples.mlm_counts]
    batch["cls_positions"][:] = 0
    batch["nsp_labels"][:] = samples.nsp_labels[:, None]
    batch["nsp_weights"][:] = 1


def fill_packed(
    batch: Dict[str, np.ndarray],
    samples: Samples,
    row: np.ndarray,
    place: np.ndarray,
    start: np.ndarray,
    mask_start: np.ndarray,
) -> None:
    """Writes N checked samples where `data.packing` put them, into the arrays of `batch`, R rows each of which gets
    some.

    `row`, `place`, `start`, `mask_start` [N] are the packing's, with rows counted from the first of `batch`; the
    samples come row after row, in the order of their places. Weights become 0 and 1 as in `fill_unpacked`.
    """
    length, slots = samples.input_ids.shape[1], samples.mlm_positions.shape[1]
    filled, used = filled_slots(length), filled_slots(slots)[samples.mlm_counts]
    inside, tokens = filled[samples.lengths], row * length + start
    lay_out(batch["input_ids"], samples.input_ids, tokens)
    lay_out(batch["token_type_ids"], inside - filled[samples.first_lengths], tokens)
    lay_out(batch["position_ids"], slot_positions(length)[samples.lengths], tokens)
    lay_out(batch["sample_ids"], inside * (place + 1).astype(np.int32)[:, None], tokens)
    masks = row * batch["mlm_weights"].shape[1] + mask_start
    lay_out(batch["mlm_positions"], (samples.mlm_positions + start.astype(np.int32)[:, None]) * used, masks)
    lay_out(batch["mlm_labels"], samples.mlm_labels, masks)
    lay_out(batch["mlm_weights"], used, masks)
    for name, value in (("cls_positions", start), ("nsp_labels", samples.nsp_labels), ("nsp_weights", 1)):
        batch[name][:] = 0
        batch[name][row, place] = value


def lay_out(out: np.ndarray, values: np.ndarray, at: np.ndarray) -> None:
    # Each sample is written in its whole width, zeros after its end included, in the order of `at`: what the zeros run
    # over is written next. So a ragged copy is as fast as a plain one. Beside `out`, where the last sample may run over
    # its end.
    width = values.shape[1]
    flat = np.zeros(out.size + width, out.dtype)
    sliding_window_view(flat, width, writeable=True)[at] = values
    out[:] = flat[: out.size].reshape(out.shape)


def normalize_weights(batch: Dict[str, np.ndarray]) -> Tuple[int, int]:
    """Turns weights of 0 and 1 into those of a global batch, in place; returns its numbers of masked tokens and
    samples."""
    counts = []
    for name in ("mlm_weights", "nsp_weights"):
        counts.append(int(np.count_nonzero(batch[name])))
        batch[name] *= np.float32(1 / max(1, counts[-1]))
    return counts[0], counts[1]


def unpacked_batch(samples: Samples) -> Dict[str, np.ndarray]:
    """The global batch of these samples, one a row (S = 1)."""
    (rows, sequence_length), mask_slots = samples.input_ids.shape, samples.mlm_positions.shape[1]
    layout = batch_layout(rows, sequence_length, mask_slots, 1)
    batch = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
    fill_unpacked(batch, samples)
    normalize_weights(batch)
    return batch


def packed_batch(samples: Samples, samples_per_row: int) -> Dict[str, np.ndarray]:
    """The global batch of these samples, up to `samples_per_row` in a row."""
    length, slots = samples.input_ids.shape[1], mask_slots_of_row(samples.mlm_positions.shape[1], samples_per_row)
    packing = pack(samples.lengths, samples.mlm_counts, length, slots, samples_per_row)
    layout = batch_layout(packing.rows, length, slots, samples_per_row)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    order = np.lexsort((packing.place, packing.row))
    fill_packed(batch, samples.take(order), *(field[order] for field in packing[1:]))
    normalize_weights(batch)
    return batch


def unpad(rows: Dict[str, np.ndarray], static: bool) -> Dict[str, np.ndarray]:
    """The samples of these rows with their T tokens laid end to end, for kernels that take samples of any length.

        input_ids, token_type_ids, position_ids [T] int32
        starts [N + 1] int32: sample n has the tokens from starts[n] up to starts[n + 1]; longest: an int that no
        sample's length exceeds mlm_positions, mlm_labels [K] int32, mlm_weights [K] float32: masked tokens; positions
        are among the T cls_positions, nsp_labels [C] int32, nsp_weights [C] float32: samples

    Padding is left out. With `static` it stays, so that T = R L and N = R (S + 1) depend on the rows' shape alone: the
    padding of a row is a sample of its own, and samples without tokens make up the number. Masked tokens and samples of
    weight 0 are always left out.
    """
    sample_ids = rows["sample_ids"]
    count, length = sample_ids.shape
    ids = sample_ids.ravel()
    first = np.empty(ids.size, bool)  # first tokens of samples and of padding
    first[:1], first[1:] = True, ids[1:] != ids[:-1]
    first[::length] = True
    kept = np.arange(ids.size) if static else np.flatnonzero(ids)
    place = np.cumsum(ids != 0) - 1 if not static else kept
    starts = np.append(place[np.flatnonzero(first if static else first & (ids != 0))], len(kept)).astype(np.int32)
    if static:
        missing = count * (rows["nsp_weights"].shape[1] + 1) + 1 - len(starts)
        starts = np.concatenate([starts, np.full(missing, len(kept), np.int32)])
    tokens = {name: rows[name].ravel()[kept] for name in ("input_ids", "token_type_ids", "position_ids")}
    tokens.update(cu_seqlens=starts, max_seqlen=length)
    for weights, positions, labels in (
        ("mlm_weights", "mlm_positions", "mlm_labels"),
        ("nsp_weights", "cls_positions", "nsp_labels"),
    ):
        row, slot = np.nonzero(rows[weights])
        tokens[positions] = place[row * length + rows[positions][row, slot]].astype(np.int32)
        tokens[labels], tokens[weights] = rows[labels][row, slot], rows[weights][row, slot]
    return tokens


@lru_cache(maxsize=None)
def filled_slots(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n has 1 in its first n slots, then 0."""
    return np.tri(slots + 1, slots, -1, dtype=np.int32)


@lru_cache(maxsize=None)
def slot_positions(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n counts 0, 1, .. in its first n slots, then has 0."""
    return filled_slots(slots) * np.arange(slots, dtype=np.int32)


def look_up(table: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    # Copying rows of a small table beats comparing and casting; "clip" because "raise" would fill a copy of `out`
    # first.
    np.take(table, index, axis=0, out=out, mode="clip")
