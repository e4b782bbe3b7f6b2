"""The order in which samples are seen: a pure function of (seed, epoch, data set).

Not of loader workers, ranks, batch size, or where a run was stopped: the only state is the number of samples seen.

A data set is its shards' sizes, in file order. It is cut into blocks of BLOCK samples that are neighbours on disk (the
last of a shard may be shorter). Each epoch permutes all blocks, puts as many of them after one another as make a window
of at most WINDOW_TOKENS tokens, and permutes the samples within each window. So a window is read in long pieces, fits
in memory, and draws from the whole data set.
"""

from typing import Iterator, NamedTuple, Sequence

import numpy as np

from data.errors import InputError

__all__ = ["BLOCK", "WINDOW_TOKENS", "Order", "Window"]

BLOCK = 256
WINDOW_TOKENS = 2**27


class Window(NamedTuple):
    """Samples that are read together: the blocks that hold them, and the order in which they are seen."""

    blocks: np.ndarray  # [blocks, 3] int64: shard, first sample in it, one past the last
    rows: np.ndarray  # [samples still to be seen] int64: which sample of the window, counted through its blocks in turn


class Order:
    """The order of samples of one data set under one seed.

    `shard_sizes`: samples in each shard, in file order. `sequence_length`: tokens of a sample; sets how many make a
    window. Raises InputError when there are no samples or the seed is negative.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, sequence_length: int):
        if seed < 0:
            raise InputError(f"the seed is {seed}, expected 0 or more")
        self.num_samples = int(sum(shard_sizes))
        if self.num_samples == 0:
            raise InputError("the data set holds no samples")
        self._seed = seed
        self._blocks = cut_blocks(shard_sizes)
        per_window = max(1, WINDOW_TOKENS // sequence_length // BLOCK)
        count = -(-len(self._blocks) // per_window)
        # Windows of equal size: a short last one would hardly be shuffled.
        self._bounds = np.arange(count + 1) * len(self._blocks) // count
        self.window_samples = int(np.diff(self._bounds).max()) * BLOCK

    def windows(self, samples_seen: int = 0) -> Iterator[Window]:
        """The windows from the one that holds the next sample on, epoch after epoch without end.

        The first window's `rows` begin with the sample number `samples_seen` of the run. Nothing is replayed to get
        there. Raises InputError when `samples_seen` is negative.
        """
        if samples_seen < 0:
            raise InputError(f"samples_seen is {samples_seen}, expected 0 or more")
        epoch, position = divmod(samples_seen, self.num_samples)
        while True:
            blocks = self._blocks[self._permutation(len(self._blocks), epoch, 0)]
            ends = np.cumsum(blocks[:, 2] - blocks[:, 1])[self._bounds[1:] - 1]
            starts = np.concatenate([[0], ends[:-1]])
            for index in range(int(np.searchsorted(ends, position, side="right")), len(ends)):
                rows = self._permutation(ends[index] - starts[index], epoch, 1 + index)
                yield Window(
                    blocks[self._bounds[index] : self._bounds[index + 1]], rows[max(0, position - starts[index]) :]
                )
            epoch, position = epoch + 1, 0

    def _permutation(self, count: int, epoch: int, purpose: int) -> np.ndarray:
        # RandomState: NumPy keeps its stream the same in every version, which it does not promise for Generator's
        # shuffles.
        key = np.random.SeedSequence(self._seed, spawn_key=(epoch, purpose))
        return np.random.RandomState(np.random.MT19937(key)).permutation(int(count))


def cut_blocks(shard_sizes: Sequence[int]) -> np.ndarray:
    parts = []
    for shard, size in enumerate(shard_sizes):
        starts = np.arange(0, size, BLOCK)
        parts.append(np.stack([np.full_like(starts, shard), starts, np.minimum(starts + BLOCK, size)], axis=1))
    return np.concatenate(parts)
