"""Global batches of labelled examples: shuffled for training, one batch ahead of it, and in order for evaluation."""

from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

import numpy as np

from data.examples.examples import LABELS, ExampleBatch, Examples, ExampleShape, make_batch
from data.loading.loader import GlobalBatch
from data.loading.order import Order
from data.loading.windows import locate
from data.rows import Part

__all__ = ["ExampleLoader", "batches_to_score"]


class ExampleLoader:
    """What `data.loading.loader.Loader` is to shards, to examples in memory: global batches without end, in the order
    of data/loading/order.py, from `position` on. A thread makes each while the one before it is trained on.

    `packing`: off, samples or rows (data/loading/loader.py). `part` has its own rows of each batch.
    """

    def __init__(
        self,
        examples: Examples,
        shape: ExampleShape,
        batch_size: int,
        seed: int,
        packing: str,
        position: int,
        part: Part,
    ):
        self.examples, self.shape, self.batch_size, self.packing, self.part = examples, shape, batch_size, packing, part
        order = Order([len(examples)], seed, shape.tokens)
        self.windows, self.waiting = order.windows(position), np.empty(0, np.int64)
        self.position = position
        self.thread = ThreadPoolExecutor(1)
        self.ahead = self.thread.submit(self.make)

    def make(self) -> GlobalBatch:
        # For as many rows there may have to be as many examples as there are tokens for.
        most = self.batch_size * (self.shape.samples if self.packing == "rows" else 1)
        while len(self.waiting) < most:
            _, numbers = locate(next(self.windows), np.zeros(1, np.int64))
            self.waiting = np.concatenate([self.waiting, numbers])
        batch, taken = make_batch(
            self.examples, self.waiting[:most], self.shape, self.packing, self.batch_size, self.part
        )
        self.waiting, self.position = self.waiting[taken:], self.position + taken
        counts = {LABELS.weights: batch.predictions}
        return GlobalBatch(batch.arrays, batch.rows, counts, self.position, {}, taken)

    def next(self) -> GlobalBatch:
        """The next global batch, or this process's part of it."""
        batch = self.ahead.result()
        self.ahead = self.thread.submit(self.make)
        return batch

    def check(self) -> None:
        """Nothing: what fails is raised by `next`."""

    def close(self) -> None:
        """Ends the thread."""
        self.thread.shutdown(wait=True)

    def __enter__(self) -> "ExampleLoader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def batches_to_score(
    examples: Examples, shape: ExampleShape, batch_size: int, packing: str, part: Part
) -> Iterator[ExampleBatch]:
    """All examples once, in order, `batch_size` at a time; of each batch the rows of one `part`."""
    for first in range(0, len(examples), batch_size):
        chosen = np.arange(first, min(first + batch_size, len(examples)))
        yield make_batch(examples, chosen, shape, "off" if packing == "off" else "samples", part=part)[0]
