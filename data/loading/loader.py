"""Global batches from shards: asynchronously and shuffled for training, plainly and in file order for evaluation.

One process reads and assembles ahead of training, in threads, into a ring of slots in shared memory; the training
thread takes a finished slot. A process, because Python's threads would get in the way of the training loop. The
processes of a machine share it.
"""

import collections
import contextlib
import json
import os
import select
from dataclasses import asdict, dataclass
from typing import Any, Deque, Dict, Iterator, Mapping, Optional, Sequence, Union

import numpy as np

from data.errors import InputError, LoaderDied
from data.loading.ring import SlotRows, ring_bytes, ring_slots, shared_file
from data.loading.shard_files import read_checked
from data.loading.sharing import ALONE, Connection, LocalRanks
from data.masking import choice_reference
from data.packing import SAMPLES_PER_ROW
from data.rows import NSP, WHOLE, Arrays, Layout, Part, RowShape, unpacked_batch, weight_counts
from data.samples import Samples
from data.shards import ShardInfo
from data.subprocesses import ChildProcess, encode

__all__ = ["GlobalBatch", "Loader", "LoaderSettings", "batches_in_order"]


@dataclass
class GlobalBatch:
    """The rows of one optimizer step, or one part of them."""

    arrays: Arrays
    """as `data.rows` describes them"""
    rows: int
    """of the global batch, all processes' together"""
    counts: Dict[str, int]
    """of each field of weights, how many are not 0: "mlm_weights" the masked tokens, "nsp_weights" the samples"""
    position: int
    """in the run's order after this batch: where another loader can continue"""
    skipped: Dict[str, str]
    """shards left out by then: path -> why"""
    samples: int
    """of all processes together"""


@dataclass(frozen=True)
class LoaderSettings:
    """How shards become batches."""

    batch_size: int
    """samples, or rows where `packing` says so"""
    seed: int
    """of the order of samples, and of dynamic masking"""
    packing: str = "off"
    """off: a batch is `batch_size` rows of one sample each. samples: it is `batch_size` samples, in as few rows as they
    fit. rows: it is `batch_size` rows, for static shapes, with as many samples as fit"""
    samples_per_row: int = SAMPLES_PER_ROW
    """at most; not with `packing` off"""
    skip_bad: bool = False
    """leave out shards that turn out bad, instead of raising"""
    workers: int = 2
    """threads that read and assemble; batches do not depend on it"""
    slots: int = 3
    """batches in memory, the one in use among them; batches do not depend on it"""

    def row_shape(self, shard: ShardInfo) -> RowShape:
        per_row = 1 if self.packing == "off" else self.samples_per_row
        return RowShape.of(shard.sequence_length, shard.mask_tokens, per_row)

    def layout(self, shard: ShardInfo, rows: int) -> Layout:
        """Of a slot of so many rows."""
        return self.row_shape(shard).layout(rows)

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        least = {"batch_size": 1, "seed": 0, "samples_per_row": 1, "workers": 1, "slots": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"the loader's {name} is {getattr(self, name)}, expected {bound} or more")


class Loader:
    """Global batches in the order of `data.loading.order`, assembled ahead of their use; without end.

    `shards`: as `open_shards` opened them. `position`: where to begin, a batch's `position` or 0. `skipped`: shards
    that were left out before. `local`: the processes that share the loader's process, each of which opens a Loader; the
    arrays of each have its part of the rows alone. All are given the same but for that. `timeout`: how many seconds the
    loader's process may send nothing while it is waited for; None: any number.

    Raises InputError, before a process is started, for a value out of range, masking that is not known, and too little
    memory. A context manager: leaving it, or the end of the process that started it in whatever way, ends the loader's
    process. Where another of those that share it ends, the rest go on.
    """

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        settings: LoaderSettings,
        position: int = 0,
        skipped: Mapping[str, str] = {},
        local: LocalRanks = ALONE,
        timeout: Optional[float] = None,
    ):
        settings.check()
        if position < 0:
            raise InputError(f"the loader's position is {position}, expected 0 or more")
        self._skipped, self._rank, self._part = dict(skipped), local.rank, local.parts[local.rank]
        self._slot_rows = SlotRows(local.parts, settings.batch_size)
        layout = settings.layout(shards[0], self._slot_rows.count)
        self._in_use: Optional[int] = None
        self._messages: Deque[Dict] = collections.deque()
        self._unread = b""
        self._closed, self._timeout = False, timeout
        self._process: Union[ChildProcess, Connection]
        if local.rank:
            assert local.endpoint is not None
            self._process = connection = Connection(local.endpoint)
            self._wait()
            memory = connection.receive_descriptor()
            self._slots = ring_slots(memory, layout, settings.slots)
            os.close(memory)
            return
        request = {
            "shards": [asdict(shard) for shard in shards],
            "settings": asdict(settings),
            "choose": choice_reference(shards[0].masked_units, shards[0].path),
            "position": position,
            "skipped": self._skipped,
            "folder": os.getcwd(),
            "parts": list(local.parts),
            "listener": local.endpoint.fileno() if local.endpoint else None,
        }
        with shared_file(ring_bytes(layout, settings.slots)) as file:
            self._slots = ring_slots(file.fileno(), layout, settings.slots)
            descriptors = [file.fileno(), *([local.endpoint.fileno()] if local.endpoint else [])]
            self._process = ChildProcess("data.loading.process", descriptors)
            self._send({**request, "memory": file.fileno()})

    def next(self) -> GlobalBatch:
        """The next global batch, or this process's part of it; waits for it only when the loader is behind.

        Its arrays are valid until the following call, which gives their memory back. Raises InputError that names a
        shard that turns out bad, cut off or removed, LoaderDied that says how the loader's process ended.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._in_use is not None:
            self._send([self._rank, self._in_use])
        while not self._messages:
            self._receive()
        message = self._messages.popleft()
        self._in_use = slot = message["slot"]
        first = self._slot_rows.first(self._part)
        rows = slice(first, first + message["filled"][self._slot_rows.parts.index(self._part)])
        arrays = {name: array[rows] for name, array in self._slots[slot].items()}
        skipped = {**self._skipped, **message["skipped"]}
        counts = message["counts"]
        return GlobalBatch(arrays, message["rows"], counts, message["position"], skipped, counts[NSP.weights])

    def check(self) -> None:
        """Raises what `next` would, as soon as the loader's process has failed: for steps that take long."""
        while not self._closed and select.select([self._process.output], [], [], 0)[0]:
            self._receive()

    def close(self) -> None:
        """Ends the loader's process at once, if this one started it, and gives its memory back; may be called again."""
        if not self._closed:
            self._closed, self._slots = True, []
            self._process.end()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _send(self, message: Any) -> None:
        self._process.send(encode(message))

    def _wait(self) -> None:
        if not select.select([self._process.output], [], [], self._timeout)[0]:
            self.close()
            raise LoaderDied(
                f"the loader's process has sent nothing for {self._timeout:g} s. Start again from the last checkpoint"
            )

    def _receive(self) -> None:
        self._wait()
        data = b""
        with contextlib.suppress(ConnectionResetError):  # an end, too
            data = os.read(self._process.output.fileno(), 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._messages.extend(map(json.loads, lines))
        failure = next((message for message in self._messages if "error" in message), None)
        if failure is None and not data:
            end = f"the loader's process {self._process.how_it_ended()}. Start again from the last checkpoint"
            failure = {"error": end, "bad_input": False}
        if failure is not None:  # batches that are ready are not used up first: a run should stop where it is
            self.close()
            raise (InputError if failure["bad_input"] else LoaderDied)(failure["error"])


def batches_in_order(shards: Sequence[ShardInfo], batch_size: int, part: Part = WHOLE) -> Iterator[GlobalBatch]:
    """Every sample of opened shards once, in file order, without processes; the last batch may be smaller. The arrays
    have the rows of one `part`.

    Weights sum to 1 over each batch. Dynamic masking is that of epoch 0 under seed 0, the same each time. Raises
    InputError about bad samples when their batch is reached.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    ends = np.cumsum([shard.num_samples for shard in shards]).tolist()
    for first in range(0, ends[-1], batch_size):
        parts = []
        for shard, end in zip(shards, ends):
            begin = end - shard.num_samples
            start, stop = max(first, begin) - begin, min(first + batch_size, end) - begin
            if start < stop:
                parts.append(read_checked(shard, start, stop, begin))
        samples = Samples.concatenate(parts)
        arrays = unpacked_batch(samples)
        counts, end = weight_counts(arrays), first + len(samples)
        yield GlobalBatch(part.of(arrays), len(samples), counts, end, {}, len(samples))
