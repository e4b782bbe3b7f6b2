"""The size of a micro-batch, where the config leaves it open: on CUDA the largest that fits, found by trying."""

import math
from typing import Callable, Dict

import numpy as np
import torch

from data.rows import RowShape

__all__ = ["full_rows", "largest_that_fits", "peak_memory"]


def largest_that_fits(peak_of: Callable[[int], int], available: int, most: int) -> int:
    """The largest number of rows, up to `most`, with peak_of(rows) <= available bytes; 0 where not even one fits.

    `peak_of` may raise torch.OutOfMemoryError. Memory grows in a straight line with the rows, so two small tries
    foretell the largest; it is tried too, and cut by an eighth until it fits.
    """

    def peak(rows: int) -> float:
        try:
            return peak_of(rows)
        except torch.OutOfMemoryError:
            return math.inf

    few, more = min(8, most), min(32, most)
    base, far = peak(few), peak(more)
    rows = more
    if few < more and far <= available:
        rows = min(most, few + int((available - base) * (more - few) / max(1, far - base)))
    while rows and peak(rows) > available:
        rows = rows * 7 // 8
    return rows


def full_rows(rows: int, length: int, mask_slots: int, samples_per_row: int) -> Dict[str, np.ndarray]:
    """A batch in which every slot is used, so that none needs more memory: samples of one length, as many as a row may
    hold."""
    batch = {
        name: np.zeros(shape, dtype)
        for name, (shape, dtype) in RowShape(length, mask_slots, samples_per_row).layout(rows).items()
    }
    sample = np.arange(length) * samples_per_row // length
    batch["sample_ids"][:] = 1 + sample
    batch["mlm_positions"][:] = np.arange(mask_slots) * length // mask_slots
    batch["cls_positions"][:] = np.searchsorted(sample, np.arange(samples_per_row))
    batch["mlm_weights"][:] = batch["nsp_weights"][:] = 1.0
    return batch


def peak_memory(engine, batch: Dict[str, np.ndarray]) -> int:
    """Bytes of CUDA memory that micro-batches of all rows of `batch` take at most, what is there already included; not
    compiled, which takes no less."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.micro_batch_size = len(batch["input_ids"])
    engine.graph.train()
    try:
        with torch.random.fork_rng(devices=[engine.device]), torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # the second has the gradients of the first beside its own
                for _, part in engine.micro_batches(batch):
                    engine.backward(engine.forward(part, {}))
        return torch.cuda.max_memory_allocated()
    finally:
        engine.clear_gradients()
