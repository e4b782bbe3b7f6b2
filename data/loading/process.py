"""The process behind `data.loading.loader.Loader`: assembles global batches in shared memory, ahead of training.

It gets the request of `Loader`, then the number of each slot that may be filled (`data.subprocesses` has the protocol).
It sends {"slot", "rows", "counts", "position", "skipped"} for each finished batch, or {"error", "bad_input"} once, and
ends. It imports neither torch nor anything that starts slowly.
"""

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterator, Optional, Tuple

import numpy as np

from data.loading.loader import LoaderSettings
from data.loading.order import Order
from data.loading.ring import ring_slots
from data.loading.windows import NextSamples, ShardFiles, read_windows
from data.masking import load_choice, mask_budget, mask_dynamic, masking_of
from data.packing import Packing, largest_prefix, one_a_row, pack
from data.rows import Arrays, fill_packed, fill_unpacked, normalize_weights
from data.samples import Samples
from data.shards import ShardInfo
from data.subprocesses import error_message, open_channel

__all__ = ["main"]

CHUNK_TOKENS = 2**18  # tokens that a thread assembles at a time: fewer would be all calls, more leave cores idle
CHECK_SECONDS = 0.5  # between looks at whether the shards are still there

Mask = Callable[[Samples, np.ndarray, np.ndarray], Samples]
"""Masks samples that have these numbers in the data set and these positions in the run's order."""


def main() -> None:
    messages, reply = open_channel()
    request = messages.get()
    os.chdir(request["folder"])

    def run(work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            reply(error_message(error))
        os._exit(1)  # without waiting for threads, which may hang in a read

    def start() -> None:
        shards = [ShardInfo(**shard) for shard in request["shards"]]
        files = ShardFiles(shards, request["settings"]["skip_bad"], request["skipped"])
        threading.Thread(target=run, args=(watch, files), daemon=True).start()
        serve(request, files, messages, reply)

    run(start)


def watch(files: ShardFiles) -> None:
    while True:
        files.check_unchanged()
        time.sleep(CHECK_SECONDS)


def serve(request: Dict, files: ShardFiles, free_slots: queue.Queue, reply: Callable[[Dict], None]) -> None:
    """Fills slot after slot, as they get free, for ever. Raises InputError that names the file that cannot be used."""
    settings, info = LoaderSettings(**request["settings"]), files.shards[0]
    order = Order([shard.num_samples for shard in files.shards], settings.seed, info.sequence_length)
    stream = SampleStream(read_windows(files, order, request["position"], settings.workers))
    slots = ring_slots(request["memory"], settings.layout(info), settings.slots)
    mask: Optional[Mask] = None
    if info.masking == "dynamic":
        masking = masking_of(info, load_choice(request["choose"]))

        def mask(samples: Samples, numbers: np.ndarray, ends: np.ndarray) -> Samples:
            return mask_dynamic(samples, numbers, settings.seed, (ends - 1) // order.num_samples, masking)

    with ThreadPoolExecutor(settings.workers) as threads:
        while True:
            slot = free_slots.get()
            chosen, packing = choose(stream, settings, info)
            rows, batch = packing.rows, {name: array[: packing.rows] for name, array in slots[slot].items()}
            fill(threads, batch, chosen, packing, mask)
            if settings.packing == "rows":  # static shapes: the rows that the last sample did not fit are empty ones
                rows = settings.batch_size
                for array in slots[slot].values():
                    array[packing.rows :] = 0
            counts = normalize_weights(batch)
            stream.advance(len(packing.row))
            skipped = {files.shards[number].path: why for number, why in chosen.skipped.items()}
            reply(dict(slot=slot, rows=rows, counts=counts, position=int(chosen.ends[-1]), skipped=skipped))


class SampleStream:
    """The samples of one window after the other, to be looked at ahead and taken from the front."""

    def __init__(self, windows: Iterator[NextSamples]):
        self._windows = windows
        # The last part is the current window, those before it are copies of what was left of earlier ones.
        self._parts = [next(windows)]

    def peek(self, count: int) -> NextSamples:
        """The next `count` samples, valid until the following call."""
        while sum(len(part.indices) for part in self._parts) < count:
            self._parts[-1] = NextSamples.concatenate(self._parts[-1:])
            self._parts.append(next(self._windows))
        if len(self._parts) == 1:
            return self._parts[0].take(slice(count))
        return NextSamples.concatenate([part.take(slice(count)) for part in self._parts]).take(slice(count))

    def advance(self, count: int) -> None:
        """Takes the next `count` samples away."""
        while len(self._parts) > 1 and count >= len(self._parts[0].indices):
            count -= len(self._parts.pop(0).indices)
        self._parts[0] = self._parts[0].take(slice(count, None))


def choose(stream: SampleStream, settings: LoaderSettings, info: ShardInfo) -> Tuple[NextSamples, Packing]:
    """The samples of the next batch and their packing."""
    count, shape = settings.batch_size, settings.row_shape(info)
    chosen = stream.peek(count)
    if settings.packing == "off":
        return chosen, one_a_row(count)
    if settings.packing == "rows":
        # More samples, until there are enough tokens to fill the rows.
        slots, most = settings.batch_size * shape.tokens, settings.batch_size * shape.samples
        while count < most and chosen.get("lengths").sum(dtype=np.int64) < slots:
            count = min(count + count // 4 + 1, most)
            chosen = stream.peek(count)
    lengths = chosen.get("lengths")
    if info.masking == "dynamic":
        mask_counts = mask_budget(lengths, chosen.get("first_lengths"), info.mask_share, info.mask_tokens)
    else:
        mask_counts = chosen.get("mlm_counts")
    if settings.packing == "rows":
        packing = largest_prefix(lengths, mask_counts, settings.batch_size, *shape)
    else:
        packing = pack(lengths, mask_counts, *shape)
    return chosen.take(slice(len(packing.row))), packing


def fill(
    threads: ThreadPoolExecutor, batch: Arrays, chosen: NextSamples, packing: Packing, mask: Optional[Mask]
) -> None:
    """Writes the chosen samples into `batch`, where `packing` puts them, masked if there is a `mask`."""
    per_row = batch["nsp_weights"].shape[1]
    order = np.argsort(packing.row * per_row + packing.place, kind="stable")
    rows = packing.row[order]
    chunk = max(1, CHUNK_TOKENS // batch["input_ids"].shape[1])

    def fill_chunk(first: int) -> None:
        part = {name: array[first : first + chunk] for name, array in batch.items()}
        here = order[np.searchsorted(rows, first) : np.searchsorted(rows, first + chunk)]
        samples = chosen.samples.take(chosen.indices[here])
        if mask is not None:
            samples = mask(samples, chosen.numbers[here], chosen.ends[here])
        if per_row == 1:
            fill_unpacked(part, samples)
        else:
            fill_packed(part, samples, packing.take(here), first)

    list(threads.map(fill_chunk, range(0, packing.rows, chunk)))


if __name__ == "__main__":
    main()
