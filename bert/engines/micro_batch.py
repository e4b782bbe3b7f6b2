"""The size of a micro-batch, where the config leaves it open and memory limits it: the largest that fits, by trying."""

import math
from typing import Callable, Dict, Sequence, Union

import numpy as np
import torch

from bert.engines.engine import Arrays
from bert.engines.torch_devices import Memory
from bert.engines.torch_engine import TorchEngine
from data.errors import InputError
from data.examples.examples import ExampleShape
from data.rows import RowShape, Target

__all__ = ["fit_micro_batch", "full_rows", "largest_that_fits"]


def fit_micro_batch(engine: TorchEngine, shape: Union[RowShape, ExampleShape], most: int) -> None:
    """Gives `engine` the largest micro-batch of up to `most` rows that fits its device beside the optimizer's state.

    Raises InputError where not even one row does.
    """
    memory = engine.device.memory
    if memory is None:
        return
    free = memory.available_bytes() - engine.optimizer.state_bytes()
    targets = engine.task.targets
    rows = largest_that_fits(lambda rows: peak_memory(engine, memory, full_rows(rows, shape, targets)), free, most)
    if not rows:
        raise InputError(
            f"not even a micro-batch of one row of {shape.tokens} tokens fits into the {free / 1e9:.1f} GB that are "
            f"free on {memory.card()}. Use a card with more memory, or a smaller model"
        )
    engine.micro_batch_size = rows


def largest_that_fits(peak_of: Callable[[int], int], available: int, most: int) -> int:
    """The largest number of rows, up to `most`, with peak_of(rows) <= available bytes; 0 where not even one fits.

    `peak_of` may raise torch.OutOfMemoryError. Memory grows in a straight line with the rows, so two small tries
    predict the largest. That is tried too, and cut by an eighth until it fits.
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


def full_rows(rows: int, shape: Union[RowShape, ExampleShape], targets: Sequence[Target]) -> Dict[str, np.ndarray]:
    """A batch in which every slot is used, so that none needs more memory: samples of one length, as many as a row may
    hold."""
    batch: Dict[str, np.ndarray] = {name: np.zeros(size, dtype) for name, (size, dtype) in shape.layout(rows).items()}
    batch["sample_ids"][:] = 1 + np.arange(shape.tokens) * shape.samples // shape.tokens
    for target in targets:
        positions, slots = batch[target.positions], batch[target.weights].shape[1]
        places = -(-np.arange(slots) * shape.tokens // slots)
        positions[:] = places.reshape(slots, *[1] * (positions.ndim - 2))
        batch[target.weights][:] = 1.0
    return batch


def peak_memory(engine: TorchEngine, memory: Memory, batch: Arrays) -> int:
    """Bytes of memory that micro-batches of all rows of `batch` take at most, what is there already included; not
    compiled, which takes no less."""
    memory.reset_peak()
    engine.micro_batch_size = len(batch["input_ids"])
    engine.model.train()
    try:
        with engine.device.fork_random(), torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # the second has the gradients of the first beside its own
                for _, micro_batch in engine.micro_batches(batch):
                    engine.backward(engine.forward(micro_batch, {}))
        return memory.peak_bytes()
    finally:
        engine.clear_gradients()
