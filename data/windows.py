"""Reads windows of samples from shards, block by block, one window ahead of the one in use.

Plain reads at a data set's place in the file, not h5py (its lock would serialize the threads) and not a memory map (a file
that is cut off while it is mapped kills the process without a word).
"""

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.order import Order
from data.shards import FIELDS, Samples, ShardInfo, check_samples, find_bad_sample

__all__ = ["ShardFiles", "read_windows"]

GROUP = 16  # blocks that one thread reads and checks at a time
CHECK_SECONDS = 0.5


class ShardFiles:
    """Shards that `open_shards` found whole, held open. Raises InputError that names the file when one cannot be opened."""

    def __init__(self, shards: Sequence[ShardInfo]):
        self.shards = shards
        allow_open_files(len(shards) + 64)
        self._descriptors = [open_file(shard.path) for shard in shards]
        self._checked = 0.0

    def read(self, shard: int, start: int, stop: int, into: Samples) -> None:
        """Reads samples [start, stop) of one shard. Raises InputError that names the file when they are not all there."""
        info = self.shards[shard]
        for name, offset in zip(FIELDS, info.offsets):
            data = getattr(into, name).reshape(-1).view(np.uint8)
            offset += start * (len(data) // (stop - start))
            while len(data):
                try:
                    count = os.preadv(self._descriptors[shard], [data], offset)
                except OSError as error:
                    raise InputError("%s: cannot read samples %d to %d (%s)" % (info.path, start, stop, error))
                if count == 0:
                    raise InputError("%s: was cut off while in use: samples %d to %d are not there. Make it again" % (
                        info.path, start, stop))
                data, offset = data[count:], offset + count

    def check_unchanged(self) -> None:
        """Raises InputError that names a shard that was removed or has another size than at the start.

        Looks at most once in CHECK_SECONDS, so that it can be called for every batch.
        """
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return
        for shard in self.shards:
            try:
                size = os.stat(shard.path).st_size
            except OSError as error:
                raise InputError("%s: was removed while in use (%s). Put it back" % (shard.path, error.strerror))
            if size != shard.file_size:
                raise InputError("%s: was changed while in use: it has %d bytes, had %d. Make it again" % (
                    shard.path, size, shard.file_size))
        self._checked = time.monotonic()


def read_windows(files: ShardFiles, order: Order, samples_seen: int, workers: int) -> Iterator[Tuple[Samples, np.ndarray]]:
    """Yields (a window's samples as they are on disk, the rows of them in the order in which they come next), without end.

    The samples are in a buffer that is used again after the next window was taken. Raises InputError that names the file and the
    sample when one cannot be read or is not as it must be.
    """
    info = files.shards[0]
    capacity = min(order.window_samples, order.num_samples)
    buffers = [Samples.empty(capacity, info.sequence_length, info.mask_tokens, info.vocab_size) for _ in range(2)]
    windows = order.windows(samples_seen)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as ahead:
        def read_next(buffer: Samples) -> Tuple[Samples, np.ndarray]:
            window = next(windows)
            ends = np.cumsum(window.blocks[:, 2] - window.blocks[:, 1])
            groups = [(window.blocks[at:at + GROUP].tolist(), ends[at:at + GROUP].tolist()) for at in range(0, len(ends), GROUP)]
            list(readers.map(lambda group: read_group(files, buffer, *group), groups))
            return buffer.take(slice(0, int(ends[-1]))), window.rows

        pending = ahead.submit(read_next, buffers[0])
        while True:
            current = pending.result()
            buffers.reverse()
            pending = ahead.submit(read_next, buffers[0])
            yield current


def read_group(files: ShardFiles, buffer: Samples, blocks: List[List[int]], ends: List[int]) -> None:
    parts = []
    for (shard, start, stop), end in zip(blocks, ends):
        parts.append(buffer.take(slice(end - (stop - start), end)))
        files.read(shard, start, stop, parts[-1])
    begin = ends[0] - len(parts[0])
    vocab_size = files.shards[0].vocab_size
    if find_bad_sample(buffer.take(slice(begin, ends[-1])), vocab_size) is not None:
        for (shard, start, _), part in zip(blocks, parts):
            check_samples(part, vocab_size, files.shards[shard].path, start)


def allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    except ValueError:
        raise InputError("the shards need %d open files, %d are allowed. Use fewer, larger shards or raise `ulimit -Hn`" % (
            count, hard))


def open_file(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError("%s: cannot be opened (%s)" % (path, error.strerror))
