"""A ring of batch slots in memory that processes share. It never has a name, so nothing can be left behind."""

import mmap
import os
import shutil
import tempfile
from typing import BinaryIO, Dict, List, Sequence, Tuple, cast

import numpy as np

from data.errors import InputError
from data.rows import Part, rank_of_rows

__all__ = ["SlotRows", "ring_bytes", "ring_slots", "shared_file"]

ALIGNMENT = 4096
CONTROL_GROUP = "/sys/fs/cgroup"


class SlotRows:
    """Where the rows of some parts of a global batch are in a slot: part after part, each with room for all that it may
    have."""

    def __init__(self, parts: Sequence[Part], batch_size: int):
        self.parts = list(dict.fromkeys(parts))  # the processes of a pipeline have the same
        self.room = self.parts[0].most_rows(batch_size)
        self.count = self.room * len(self.parts)

    def first(self, part: Part) -> int:
        """The first row of a part."""
        return self.parts.index(part) * self.room

    def place(self, tokens: np.ndarray) -> Tuple[np.ndarray, List[range]]:
        """[R] int64, the row of the slot for each of the global batch, which have `tokens` [R], -1 where it is of
        another part; and the rows of the slot that each part has then."""
        ranks, places, filled = rank_of_rows(tokens, self.parts[0].size), np.full(len(tokens), -1), []
        for part in self.parts:
            rows = np.flatnonzero(ranks == part.rank)
            filled.append(range(self.first(part), self.first(part) + len(rows)))
            places[rows] = filled[-1]
        return places, filled


def ring_bytes(layout: Dict[str, tuple], slots: int) -> int:
    """Bytes of `slots` batches of this layout (name -> shape, dtype), each array on a page of its own."""
    return slots * sum(map(aligned_bytes, layout.values()))


def ring_slots(descriptor: int, layout: Dict[str, tuple], slots: int) -> List[Dict[str, np.ndarray]]:
    """The arrays of each slot, in a file that `shared_file` made. It stays mapped as long as one of them lives."""
    memory = mmap.mmap(descriptor, ring_bytes(layout, slots))
    views, offset = [], 0
    for _ in range(slots):
        arrays = {}
        for name, (shape, dtype) in layout.items():
            arrays[name] = np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)
            offset += aligned_bytes((shape, dtype))
        views.append(arrays)
    return views


def shared_file(size: int) -> BinaryIO:
    """A nameless file of `size` bytes, in memory (Linux) or in the folder for temporary files; all allocated now.

    Raises InputError that says how much is needed and available when there is not enough.
    """
    in_memory = hasattr(os, "memfd_create")
    place = "memory" if in_memory else tempfile.gettempdir()
    available = available_memory() if in_memory else shutil.disk_usage(place).free
    sizes = f"need {size / 1e6:.1f} MB in {place}, {available / 1e6:.1f} MB are available"
    shortage = f"the loader's batches {sizes}. Lower the global batch or free some"
    if size > available:
        raise InputError(shortage)
    if in_memory:
        file: BinaryIO = os.fdopen(os.memfd_create("bert-batches"), "w+b")
    else:
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    try:
        os.ftruncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):  # without this a full disk would be a SIGBUS in the middle of a batch
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise InputError(f"{shortage} ({error})")
    return file


def available_memory() -> int:
    """Bytes that this process can still have: the machine's, or less in a control group (version 2) with a limit."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = read_word(os.path.join(CONTROL_GROUP, "memory.max"))
    if not limit.isdigit():  # "max", or no such group
        return available
    with open(os.path.join(CONTROL_GROUP, "memory.stat")) as lines:
        counts = dict(line.split() for line in lines)
    # Pages of files count as used, but give way: shards that were read would else leave no memory.
    files = int(counts["inactive_file"]) + int(counts["active_file"])
    used = int(read_word(os.path.join(CONTROL_GROUP, "memory.current"))) - files
    return max(0, min(available, int(limit) - used))


def read_word(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read().strip()


def aligned_bytes(array: tuple) -> int:
    shape, dtype = array
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT
