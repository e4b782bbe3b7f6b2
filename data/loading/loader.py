"""Global batches from shards: asynchronously and shuffled for training, plainly and in file order for evaluation.

One process reads and assembles ahead of training, in threads, into a ring of slots in shared memory; the training
thread takes a finished slot. A process, because Python's threads would get in the way of the training loop; one,
started anew rather than forked, because it starts fast and takes nothing of the parent's with it.
"""

import collections
import json
import mmap
import os
import select
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Dict, Iterator, Optional, Sequence, Union

import numpy as np

from data.errors import InputError, LoaderDied
from data.loading.ring import ring_bytes, ring_slots, shared_file
from data.loading.shard_files import open_shards, read_checked
from data.packing import SAMPLES_PER_ROW, mask_slots_of_row
from data.rows import batch_layout, unpacked_batch
from data.samples import Samples
from data.shards import ShardInfo
from data.subprocesses import PROJECT, end_process, how_it_ended

__all__ = ["GlobalBatch", "Loader", "batches_in_order"]


@dataclass
class GlobalBatch:
    """The rows of one optimizer step: arrays as `data.rows` describes them, the samples and masked tokens they hold,
    and the position in the run's order after them and the shards left out by then (path -> why), from which another
    loader goes on."""

    arrays: Dict[str, np.ndarray]
    samples: int
    masked_tokens: int
    position: int
    skipped: Dict[str, str]


class Loader:
    """Global batches in the order of `data.loading.order`, assembled ahead of their use; without end.

    `files`: paths and globs of shards, or shards that `open_shards` opened for this run. `packing`: "samples": a batch
    is `batch_size` samples, in as few rows as they fit, up to `samples_per_row` in each; "rows": it is `batch_size`
    rows, static shapes, with as many samples as fit, and the next batch goes on after them; "off": `batch_size` rows of
    one sample. `position`: where to go on (a batch's `position`; 0: at the start). `skip_bad`: leave shards out that
    turn out bad, instead of raising; a batch's `skipped` says which, and why, and `skipped` those that were left out
    before. `workers`: threads that read and assemble. `slots`: global batches in memory, the one in use among them;
    neither changes what is in a batch.

    Raises InputError, before a process is started, for shards that cannot be used (see `open_shards`), a value out of
    range, and too little memory. A context manager: leaving it, or the end of this process in whatever way, ends the
    loader's process.
    """

    def __init__(
        self,
        files: Sequence[Union[str, ShardInfo]],
        batch_size: int,
        seed: int,
        sequence_length: int,
        mask_tokens: int,
        vocab_size: int,
        packing: str = "off",
        samples_per_row: int = SAMPLES_PER_ROW,
        position: int = 0,
        skip_bad: bool = False,
        skipped: Optional[Dict[str, str]] = None,
        workers: int = 2,
        slots: int = 3,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("position", position, 0),
            ("samples_per_row", samples_per_row, 1),
            ("workers", workers, 1),
            ("slots", slots, 2),
        ):
            if value < least:
                raise InputError(f"the loader's {name} is {value}, expected {least} or more")
        self._left_out = dict(skipped or {})
        shards = files
        if not all(isinstance(file, ShardInfo) for file in files):
            shards = open_shards(files, sequence_length, mask_tokens, vocab_size, self._left_out if skip_bad else None)
        self.num_samples = sum(shard.num_samples for shard in shards)
        per_row = 1 if packing == "off" else samples_per_row
        layout = batch_layout(batch_size, sequence_length, mask_slots_of_row(mask_tokens, per_row), per_row)
        size = ring_bytes(layout, slots)
        with shared_file(size) as memory:
            self._slots = ring_slots(mmap.mmap(memory.fileno(), size), layout, slots)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data.loading.process"],
                cwd=PROJECT,
                pass_fds=[memory.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._in_use, self._messages, self._unread = None, collections.deque(), b""
            self._send(
                {
                    "shards": [asdict(shard) for shard in shards],
                    "batch_size": batch_size,
                    "packing": packing,
                    "seed": seed,
                    "layout": {name: (shape, np.dtype(dtype).str) for name, (shape, dtype) in layout.items()},
                    "position": position,
                    "skip_bad": skip_bad,
                    "skipped": {
                        number: self._left_out[shard.path]
                        for number, shard in enumerate(shards)
                        if shard.path in self._left_out
                    },
                    "workers": workers,
                    "slots": slots,
                    "memory": memory.fileno(),
                    "folder": os.getcwd(),
                    "parent": os.getpid(),
                }
            )
        for slot in range(slots):
            self._send(slot)

    def next(self) -> GlobalBatch:
        """The next global batch; waits for it only when the loader is behind.

        Its arrays are views of a slot that the following call of `next` gives back: they are valid until then, copy
        what is needed for longer. Raises InputError when a shard turns out bad, cut off or removed (the message names
        it), LoaderDied when the loader's process ended (the message says how).
        """
        if self._process is None:
            raise RuntimeError("the loader is closed")
        if self._in_use is not None:
            self._send(self._in_use)
        while not self._messages:
            self._receive()
        message = self._messages.popleft()
        self._in_use = message["slot"]
        arrays = {name: array[: message["rows"]] for name, array in self._slots[self._in_use].items()}
        return GlobalBatch(
            arrays,
            message["samples"],
            message["masked_tokens"],
            message["position"],
            dict(self._left_out, **message["skipped"]),
        )

    def check(self) -> None:
        """Raises what `next` would, as soon as the loader's process has failed: for steps that take long."""
        while self._process is not None and select.select([self._process.stdout], [], [], 0)[0]:
            self._receive()

    def _receive(self) -> None:
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._messages.extend(map(json.loads, lines))
        failed = [message for message in self._messages if "error" in message] or ([] if data else [self._obituary()])
        if failed:  # batches that are ready are not used up first: a run should stop where it is
            self.close()
            raise (InputError if failed[0]["bad_input"] else LoaderDied)(failed[0]["error"])

    def close(self) -> None:
        """Ends the loader's process at once and gives its memory back; may be called again."""
        if self._process is None:
            return
        process, self._process, self._slots = self._process, None, None
        end_process(process)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _send(self, message) -> None:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: why is what `next` reads

    def _obituary(self) -> Dict:
        return {
            "error": f"the loader's process {how_it_ended(self._process)}. Start again from the last checkpoint",
            "bad_input": False,
        }


def batches_in_order(
    files: Sequence[str], batch_size: int, sequence_length: int, mask_tokens: int, vocab_size: int
) -> Iterator[GlobalBatch]:
    """Every sample once, in file order, without processes; the last batch may be smaller. Weights sum to 1 over each
    batch.

    Samples that are masked anew in each epoch are masked as in epoch 0 under seed 0, the same each time.

    Raises InputError as `Loader` does, about bad samples when their batch is reached.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    shards = open_shards(files, sequence_length, mask_tokens, vocab_size)
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
        yield GlobalBatch(arrays, len(samples), int(samples.mlm_counts.sum()), first + len(samples), {})
