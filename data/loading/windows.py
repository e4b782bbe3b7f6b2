"""Reads windows of samples from shards, block by block, one window ahead of the one in use.

Plain reads at a data set's place in the file (of NVIDIA's compressed files: h5py's), not h5py (its lock would serialize
the threads) and not a memory map (a file that is cut off while it is mapped kills the process without a word).
"""

import contextlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import h5py
import numpy as np

from data.errors import InputError
from data.foreign.nvidia import read_nvidia
from data.loading.order import Order
from data.samples import FIELDS, Samples, check_samples, find_bad_sample
from data.shards import ShardInfo

__all__ = ["ShardFiles", "Upcoming", "read_windows"]

GROUP = 16  # blocks that one thread reads and checks at a time


class ShardFiles:
    """Shards that `open_shards` found whole, held open. Raises InputError that names the file when one cannot be
    opened.

    With `skip_bad`, a shard that turns out bad is kept in `skipped` (number -> why) and read no more, unless all are.
    `skipped` has those that were left out before.
    """

    def __init__(self, shards: Sequence[ShardInfo], skip_bad: bool = False, skipped: Optional[Dict[int, str]] = None):
        self.shards, self.skipped, self._skip_bad = shards, dict(skipped or {}), skip_bad
        allow_open_files(len(shards) + 64)
        self._files = [open_file(shard.path) if shard.offsets else h5py.File(shard.path, "r") for shard in shards]

    @contextlib.contextmanager
    def tolerate(self, shard: int):
        """An InputError inside is raised, or where bad shards are skipped, noted: this one is read no more."""
        try:
            yield
        except InputError as error:
            if not self._skip_bad:
                raise
            self.skipped[shard] = str(error)
            if all(number in self.skipped or info.num_samples == 0 for number, info in enumerate(self.shards)):
                raise InputError(f"every shard is bad; the last one: {error}")

    def read(self, shard: int, start: int, stop: int, into: Samples) -> None:
        """Reads samples [start, stop) of one shard. Raises InputError that names the file when they are not all
        there."""
        info = self.shards[shard]
        if not info.offsets:
            found = read_nvidia(info.path, start, stop, info.vocab_size, self._files[shard])
            for name in FIELDS:
                getattr(into, name)[:] = getattr(found, name)
        for name, offset in zip(FIELDS, info.offsets):
            data = getattr(into, name).reshape(-1).view(np.uint8)
            offset += start * (len(data) // (stop - start))
            while len(data):
                try:
                    count = os.preadv(self._files[shard], [data], offset)
                except OSError as error:
                    raise InputError(f"{info.path}: cannot read samples {start} to {stop} ({error})")
                if count == 0:
                    raise InputError(
                        f"{info.path}: was cut off while in use: samples {start} to {stop} are not there. Make it again"
                    )
                data, offset = data[count:], offset + count

    def check_unchanged(self) -> None:
        """Raises InputError that names a shard that was removed or has another size than at the start."""
        for number, shard in enumerate(self.shards):
            if number not in self.skipped:
                with self.tolerate(number):
                    check_unchanged(shard)


class Upcoming(NamedTuple):
    """The next N samples, in order."""

    samples: Samples  # what holds them, among others
    skipped: Dict[int, str]  # shards that are left out by now
    index: np.ndarray  # [N] int64: which of `samples` each is
    ends: np.ndarray  # [N] int64: the position in the run's order after each, where a run goes on
    numbers: np.ndarray  # [N] int64: which sample of the data set each is, through the shards in turn
    epochs: np.ndarray  # [N] int64

    def first(self, count: int) -> "Upcoming":
        return Upcoming(self.samples, self.skipped, *(field[:count] for field in self[2:]))

    def after(self, count: int) -> "Upcoming":
        return Upcoming(self.samples, self.skipped, *(field[count:] for field in self[2:]))

    def copy(self) -> "Upcoming":
        """The same in memory of its own."""
        return Upcoming(self.samples.take(self.index), self.skipped, np.arange(len(self.index)), *self[3:])

    @staticmethod
    def concatenate(parts: Sequence["Upcoming"]) -> "Upcoming":
        copies = [part.copy() for part in parts]
        samples = Samples.concatenate([part.samples for part in copies])
        fields = [np.concatenate(parts) for parts in list(zip(*copies))[3:]]
        return Upcoming(samples, copies[-1].skipped, np.arange(len(samples)), *fields)


def read_windows(files: ShardFiles, order: Order, position: int, workers: int) -> Iterator[Upcoming]:
    """Yields what is left of the window at `position`, then one window after the other, without end; samples of shards
    that are skipped are left out.

    The samples are in a buffer that is used again after the next window was taken. Raises InputError that names the
    file and the sample when one cannot be read or is not as it must be.
    """
    info = files.shards[0]
    capacity = min(order.window_samples, order.num_samples)
    buffers = [Samples.empty(capacity, info.sequence_length, info.mask_tokens, info.vocab_size) for _ in range(2)]
    windows = order.windows(position)
    before = np.cumsum([0] + [shard.num_samples for shard in files.shards])
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as ahead:

        def read_next(buffer: Samples, position: int) -> Tuple[Upcoming, int]:
            window = next(windows)
            sizes = window.blocks[:, 2] - window.blocks[:, 1]
            block_ends = np.cumsum(sizes)
            groups = [
                (window.blocks[at : at + GROUP].tolist(), block_ends[at : at + GROUP].tolist())
                for at in range(0, len(block_ends), GROUP)
            ]
            list(readers.map(lambda group: read_group(files, buffer, *group), groups))
            block_of = np.repeat(np.arange(len(sizes)), sizes)[window.rows]
            numbers = (before[window.blocks[:, 0]] + window.blocks[:, 1] - block_ends + sizes)[block_of] + window.rows
            ends = position + 1 + np.arange(len(window.rows))
            fields = (window.rows, ends, numbers, np.full(len(numbers), position // order.num_samples))
            skipped = dict(files.skipped)
            if skipped:
                kept = ~np.isin(window.blocks[block_of, 0], list(skipped))
                fields = tuple(field[kept] for field in fields)
            return Upcoming(buffer.take(slice(0, int(block_ends[-1]))), skipped, *fields), int(ends[-1])

        pending = ahead.submit(read_next, buffers[0], position)
        while True:
            current, position = pending.result()
            buffers.reverse()
            pending = ahead.submit(read_next, buffers[0], position)
            yield current


def read_group(files: ShardFiles, buffer: Samples, blocks: List[List[int]], ends: List[int]) -> None:
    parts = []
    for (shard, start, stop), end in zip(blocks, ends):
        parts.append(buffer.take(slice(end - (stop - start), end)))
        with files.tolerate(shard):
            if shard not in files.skipped:
                files.read(shard, start, stop, parts[-1])
    begin = ends[0] - len(parts[0])
    vocab_size = files.shards[0].vocab_size
    if find_bad_sample(buffer.take(slice(begin, ends[-1])), vocab_size) is not None:
        for (shard, start, _), part in zip(blocks, parts):
            with files.tolerate(shard):
                if shard not in files.skipped:
                    check_samples(part, vocab_size, files.shards[shard].path, start)


def check_unchanged(shard: ShardInfo) -> None:
    try:
        size = os.stat(shard.path).st_size
    except OSError as error:
        raise InputError(f"{shard.path}: was removed while in use ({error.strerror}). Put it back")
    if size != shard.file_size:
        raise InputError(
            f"{shard.path}: was changed while in use: it has {size} bytes, had {shard.file_size}. Make it again"
        )


def allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    except ValueError:
        raise InputError(
            f"the shards need {count} open files, {hard} are allowed. Use fewer, larger shards or raise `ulimit -Hn`"
        )


def open_file(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})")
