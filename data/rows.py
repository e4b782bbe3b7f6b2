"""Rows: the batch format of the graph, on every device.

Shape letters: R rows, L token slots of a row, M mask slots of a row, S samples of a row.

    input_ids, token_type_ids, position_ids, sample_ids [R, L] int32; sample_ids: 0 = padding, 1..S = which sample of the row
    mlm_positions, mlm_labels [R, M] int32, mlm_weights [R, M] float32
    cls_positions, nsp_labels [R, S] int32, nsp_weights [R, S] float32

The weights of a global batch sum to 1 over its masked tokens and to 1 over its samples, so that summing the weighted losses
over any cut into micro-batches gives the mean over the global batch, and its gradient.
"""

from functools import lru_cache
from typing import Dict, Tuple

import numpy as np

from data.shards import Samples

__all__ = ["batch_layout", "fill_unpacked", "unpacked_batch", "weigh"]


def batch_layout(rows: int, sequence_length: int, mask_slots: int, samples_per_row: int) -> Dict[str, tuple]:
    """Name -> (shape, dtype) of each array of a batch."""
    tokens, masks, samples = (rows, sequence_length), (rows, mask_slots), (rows, samples_per_row)
    return {
        "input_ids": (tokens, np.int32), "token_type_ids": (tokens, np.int32),
        "position_ids": (tokens, np.int32), "sample_ids": (tokens, np.int32),
        "mlm_positions": (masks, np.int32), "mlm_labels": (masks, np.int32), "mlm_weights": (masks, np.float32),
        "cls_positions": (samples, np.int32), "nsp_labels": (samples, np.int32), "nsp_weights": (samples, np.float32),
    }


def fill_unpacked(batch: Dict[str, np.ndarray], samples: Samples) -> None:
    """Writes R samples that were checked, one a row, into the arrays of `batch`, R rows with S = 1.

    Their weights become 1 for each masked token and each sample; `weigh` makes them the global batch's when all rows are there.
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


def weigh(batch: Dict[str, np.ndarray]) -> Tuple[int, int]:
    """Turns weights of 0 and 1 into those of a global batch, in place; returns its numbers of masked tokens and samples."""
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
    weigh(batch)
    return batch


@lru_cache(maxsize=None)
def filled_slots(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n has 1 in its first n slots, then 0."""
    return np.tri(slots + 1, slots, -1, dtype=np.int32)


@lru_cache(maxsize=None)
def slot_positions(slots: int) -> np.ndarray:
    """[slots + 1, slots] int32: row n counts 0, 1, .. in its first n slots, then has 0."""
    return filled_slots(slots) * np.arange(slots, dtype=np.int32)


def look_up(table: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    # Copying rows of a small table beats comparing and casting; "clip" because "raise" would fill a copy of `out` first.
    np.take(table, index, axis=0, out=out, mode="clip")
