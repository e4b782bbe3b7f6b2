"""Reads windows of samples from shards, block by block, one window ahead of the one in use.

Plain reads at a data set's place in the file (of NVIDIA's compressed files: h5py's), not h5py (its lock would serialize
the threads) and not a memory map (a file that is cut off while it is mapped kills the process without a word).
"""

import contextlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple, Union

import h5py
import numpy as np

from data.errors import InputError
from data.foreign.nvidia import read_nvidia
from data.loading.order import Order, Window
from data.samples import FIELDS, Samples, check_samples, find_bad_sample
from data.shards import ShardInfo

__all__ = ["NextSamples", "ShardFiles", "locate", "read_windows"]

GROUP = 16  # blocks that one thread reads and checks at a time


class ShardFiles:
    """Shards that `open_shards` found whole, held open. Raises InputError that names a file that cannot be opened.

    With `skip_bad`, a shard that turns out bad is noted in `skipped` (number -> why) and no longer read, unless all
    are bad. `left_out` (path -> why): those that were skipped before.
    """

    def __init__(self, shards: Sequence[ShardInfo], skip_bad: bool = False, left_out: Mapping[str, str] = {}):
        self.shards, self._skip_bad = shards, skip_bad
        self.skipped = {number: left_out[shard.path] for number, shard in enumerate(shards) if shard.path in left_out}
        allow_open_files(len(shards) + 64)
        self._files: List[Any] = [open_file(shard) for shard in shards]

    @contextlib.contextmanager
    def skipping_bad(self, shard: int) -> Iterator[None]:
        """An InputError of the body is raised or, where bad shards are skipped, noted."""
        try:
            yield
        except InputError as error:
            if not self._skip_bad:
                raise
            self.skipped[shard] = str(error)
            if all(number in self.skipped or info.num_samples == 0 for number, info in enumerate(self.shards)):
                raise InputError(f"every shard is bad; the last one: {error}")

    def read(self, shard: int, start: int, stop: int, into: Samples) -> None:
        """Reads samples [start, stop) of a shard. Raises InputError that names it when they are not all there."""
        info, file = self.shards[shard], self._files[shard]
        if info.is_nvidia:
            samples = read_nvidia(info.path, start, stop, info.vocab_size, file)
            for name in FIELDS:
                getattr(into, name)[:] = getattr(samples, name)
            return
        for name, offset in zip(FIELDS, info.offsets):
            data = getattr(into, name).reshape(-1).view(np.uint8)
            offset += start * (len(data) // (stop - start))
            while len(data):
                try:
                    count = read_into(file, data, offset)
                except OSError as error:
                    raise InputError(f"{info.path}: cannot read samples {start} to {stop} ({error})")
                if count == 0:
                    missing = f"samples {start} to {stop} are not there"
                    raise InputError(f"{info.path}: was cut off while in use: {missing}. Make it again")
                data, offset = data[count:], offset + count

    def check_unchanged(self) -> None:
        """Raises InputError that names a shard that was removed or has another size than at the start."""
        for number, shard in enumerate(self.shards):
            if number in self.skipped:
                continue
            with self.skipping_bad(number):
                try:
                    size = os.stat(shard.path).st_size
                except OSError as error:
                    raise InputError(f"{shard.path}: was removed while in use ({error.strerror}). Put it back")
                if size != shard.file_size:
                    change = f"it has {size} bytes, had {shard.file_size}"
                    raise InputError(f"{shard.path}: was changed while in use: {change}. Make it again")


class NextSamples(NamedTuple):
    """The next N samples, in order."""

    samples: Samples  # what holds them, among others
    skipped: Dict[int, str]  # shards that are left out by now
    indices: np.ndarray  # [N] int64: which of `samples` each is
    ends: np.ndarray  # [N] int64: the position in the run's order after each
    numbers: np.ndarray  # [N] int64: which sample of the data set each is, through the shards in turn

    def get(self, name: str) -> np.ndarray:
        """One field of the samples."""
        return getattr(self.samples, name)[self.indices]

    def take(self, part: Union[slice, np.ndarray]) -> "NextSamples":
        return NextSamples(self.samples, self.skipped, *(field[part] for field in self[2:]))

    @staticmethod
    def concatenate(parts: Sequence["NextSamples"]) -> "NextSamples":
        """One after the other, in memory of their own."""
        samples = Samples.concatenate([part.samples.take(part.indices) for part in parts])
        ends, numbers = [np.concatenate(fields) for fields in list(zip(*parts))[3:]]
        return NextSamples(samples, parts[-1].skipped, np.arange(len(samples)), ends, numbers)


def locate(window: Window, first_numbers: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Which block of a window each of its samples is in, and the sample's number in the data set, both [N].

    `first_numbers`: those of the shards' first samples, counted through the shards in turn.
    """
    shard, start, stop = window.blocks.T
    sizes = stop - start
    first_rows = np.cumsum(sizes) - sizes
    block = np.repeat(np.arange(len(sizes)), sizes)[window.rows]
    return block, (first_numbers[shard] + start - first_rows)[block] + window.rows


def read_windows(files: ShardFiles, order: Order, position: int, workers: int) -> Iterator[NextSamples]:
    """Yields the rest of the window at `position`, then window after window, without end, without skipped shards.

    The samples are in a buffer that is used again after the next window was taken. Raises InputError that names the
    file and the sample when one cannot be read or is not as it must be.
    """
    info = files.shards[0]
    capacity = min(order.window_samples, order.num_samples)
    buffers = [Samples.empty(capacity, info.sequence_length, info.mask_tokens, info.vocab_size) for _ in range(2)]
    windows = order.windows(position)
    sizes = np.array([shard.num_samples for shard in files.shards])
    first_numbers = np.cumsum(sizes) - sizes
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as ahead:

        def read_next(buffer: Samples, position: int) -> Tuple[NextSamples, int]:
            window = next(windows)
            list(readers.map(lambda blocks: read_blocks(files, *blocks), groups_of_blocks(window, buffer)))
            block, numbers = locate(window, first_numbers)
            end, skipped = position + len(window.rows), dict(files.skipped)
            fields = [window.rows, np.arange(position + 1, end + 1), numbers]
            if skipped:
                kept = ~np.isin(window.blocks[block, 0], list(skipped))
                fields = [field[kept] for field in fields]
            return NextSamples(buffer, skipped, *fields), end

        pending = ahead.submit(read_next, buffers[0], position)
        while True:
            current, position = pending.result()
            buffers.reverse()
            pending = ahead.submit(read_next, buffers[0], position)
            yield current


def groups_of_blocks(window: Window, buffer: Samples) -> Iterator[Tuple[List[List[int]], Samples]]:
    """GROUP blocks at a time, and the part of the buffer that they go to."""
    ends = np.cumsum(window.blocks[:, 2] - window.blocks[:, 1])
    blocks, start = window.blocks.tolist(), 0
    for at in range(0, len(blocks), GROUP):
        end = int(ends[at : at + GROUP][-1])
        yield blocks[at : at + GROUP], buffer.take(slice(start, end))
        start = end


def read_blocks(files: ShardFiles, blocks: List[List[int]], into: Samples) -> None:
    """Reads blocks (shard, first sample, one past the last) end to end, and checks them.

    Raises InputError about a bad one, or skips its shard.
    """
    parts, end = [], 0
    for shard, start, stop in blocks:
        parts.append(into.take(slice(end, end + stop - start)))
        end += stop - start
        with files.skipping_bad(shard):
            if shard not in files.skipped:
                files.read(shard, start, stop, parts[-1])
    vocab_size = files.shards[0].vocab_size
    if find_bad_sample(into, vocab_size) is None:
        return
    for (shard, start, _), part in zip(blocks, parts):
        with files.skipping_bad(shard):
            if shard not in files.skipped:
                check_samples(part, vocab_size, files.shards[shard].path, start)


def read_into(file: int, data: np.ndarray, offset: int) -> int:
    """Fills `data` with what is at `offset` of a file, or its beginning; returns how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [data.data], offset)
    found = os.pread(file, len(data), offset)
    data[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)


def allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    except ValueError:
        advice = "Use fewer, larger shards or raise `ulimit -Hn`"
        raise InputError(f"the shards need {count} open files, {hard} are allowed. {advice}")


def open_file(shard: ShardInfo) -> Union[int, h5py.File]:
    try:
        return h5py.File(shard.path, "r") if shard.is_nvidia else os.open(shard.path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{shard.path}: cannot be opened ({error.strerror or error})")
