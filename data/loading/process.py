"""The process behind `data.loading.loader.Loader`: reads, shuffles and assembles global batches into shared memory,
ahead of training.

It speaks JSON lines. In: the settings (a dict), then the number of each slot that may be filled. Out: {"slot", "rows",
"samples", "masked_tokens", "position", "skipped"} for each finished batch, or {"error", "bad_input"} once, then it
ends. It ends too when its parent does. It imports neither torch nor anything that starts slowly.
"""

import functools
import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterator, Optional, Tuple

import numpy as np

from data.errors import InputError
from data.loading.order import Order
from data.loading.ring import ring_bytes, ring_slots
from data.loading.windows import ShardFiles, Upcoming, read_windows
from data.masking import mask_budget, mask_dynamic, mask_words_of
from data.packing import Packing, largest_prefix, one_a_row, pack
from data.rows import fill_packed, fill_unpacked, normalize_weights
from data.shards import ShardInfo

__all__ = ["main"]

CHUNK_TOKENS = 2**18  # tokens that a thread assembles at a time: fewer would be all calls, more leave cores idle
CHECK_SECONDS = 0.5  # between looks at whether the shards are still there


def main() -> None:
    # A signal to the whole process group is the parent's to handle, which may want some more batches first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    line = sys.stdin.readline()
    if not line:
        return  # the parent ended before it said what to do
    settings = json.loads(line)
    os.chdir(settings["folder"])
    free = queue.Queue()
    threading.Thread(target=listen, args=(free,), daemon=True).start()
    threading.Thread(target=exit_with_parent, args=(settings["parent"],), daemon=True).start()

    lock = threading.Lock()

    def say(**message) -> None:
        with lock:
            out.write(json.dumps(message) + "\n")
            out.flush()

    def do(work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except InputError as error:
            say(error=str(error), bad_input=True)
        except BaseException:
            say(error=traceback.format_exc(), bad_input=False)
        os._exit(1)  # no waiting for threads that may hang in a read

    def start() -> None:
        skipped = {int(number): why for number, why in settings["skipped"].items()}
        files = ShardFiles([ShardInfo(**shard) for shard in settings["shards"]], settings["skip_bad"], skipped)
        threading.Thread(target=do, args=(watch, files), daemon=True).start()
        serve(settings, files, free, say)

    do(start)


def listen(free: "queue.Queue") -> None:
    for line in sys.stdin:
        free.put(json.loads(line))
    os._exit(0)


def exit_with_parent(parent: int) -> None:
    # The end of stdin says so at once, unless another process that the parent forked holds the pipe open.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def watch(files: ShardFiles) -> None:
    while True:
        files.check_unchanged()
        time.sleep(CHECK_SECONDS)


def read_layout(described: Dict) -> Dict[str, tuple]:
    return {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in described.items()}


def serve(settings: Dict, files: ShardFiles, free: "queue.Queue", say: Callable) -> None:
    """Fills slot after slot, as they get free, for ever. Raises InputError that names the file that cannot be used."""
    info, workers, layout = files.shards[0], settings["workers"], read_layout(settings["layout"])
    order = Order([shard.num_samples for shard in files.shards], settings["seed"], info.sequence_length)
    stream = SampleStream(read_windows(files, order, settings["position"], workers))
    masks = None
    if info.masking == "dynamic":
        masks = functools.partial(
            mask_dynamic, seed=settings["seed"], words=mask_words_of(info), mask_share=info.mask_share
        )
    memory = mmap.mmap(settings["memory"], ring_bytes(layout, settings["slots"]))
    slots = ring_slots(memory, layout, settings["slots"])
    with ThreadPoolExecutor(workers) as threads:
        while True:
            slot = free.get()
            chosen, packing = choose(stream, settings, layout, info)
            batch = {name: array[: packing.rows] for name, array in slots[slot].items()}
            assemble(threads, batch, chosen, packing, masks)
            rows = packing.rows
            if settings["packing"] == "rows":  # static shapes: the rows that the last sample did not fit are empty ones
                rows = settings["batch_size"]
                for array in slots[slot].values():
                    array[packing.rows : rows] = 0
            masked_tokens, count = normalize_weights(batch)
            stream.advance(count)
            say(
                slot=slot,
                rows=rows,
                samples=count,
                masked_tokens=masked_tokens,
                position=int(chosen.ends[-1]),
                skipped={files.shards[number].path: why for number, why in chosen.skipped.items()},
            )


class SampleStream:
    """The samples of one window after the other, to be looked at ahead and taken from the front."""

    def __init__(self, windows: Iterator[Upcoming]):
        self._windows = windows
        self._held = []  # of earlier windows, not taken yet: copies, for the windows' buffers are used again
        self._window = next(windows)

    def peek(self, count: int) -> Upcoming:
        """The next `count` samples, valid until the following call."""
        while sum(len(part.index) for part in self._held) + len(self._window.index) < count:
            self._held.append(self._window.copy())
            self._window = next(self._windows)
        if not self._held:
            return self._window.first(count)
        return Upcoming.concatenate(self._held + [self._window.first(count)]).first(count)

    def advance(self, count: int) -> None:
        """Takes the next `count` samples away."""
        while self._held and count:
            taken = min(count, len(self._held[0].index))
            self._held[0] = self._held[0].after(taken)
            count -= taken
            if len(self._held[0].index) == 0:
                del self._held[0]
        self._window = self._window.after(count)


def choose(stream: SampleStream, settings: Dict, layout: Dict, info: ShardInfo) -> Tuple[Upcoming, Packing]:
    """The samples of the next batch and their packing."""
    batch_size, (_, mask_slots), (_, per_row) = settings["batch_size"], layout["mlm_labels"][0], layout["nsp_labels"][0]
    next_ones = stream.peek(batch_size)
    if settings["packing"] == "off":
        return next_ones, one_a_row(batch_size)
    length = info.sequence_length
    limits = (length, mask_slots, per_row)
    if settings["packing"] == "rows":
        # More samples, until there are enough tokens to fill the rows.
        count = batch_size
        while (
            count < batch_size * per_row
            and next_ones.samples.lengths[next_ones.index].sum(dtype=np.int64) < batch_size * length
        ):
            count = min(count + count // 4 + 1, batch_size * per_row)
            next_ones = stream.peek(count)
    lengths, counts = next_ones.samples.lengths[next_ones.index], next_ones.samples.mlm_counts[next_ones.index]
    if info.masking == "dynamic":
        counts = mask_budget(lengths, info.mask_share, info.mask_tokens)
    if settings["packing"] == "rows":
        packing = largest_prefix(lengths, counts, batch_size, *limits)
    else:
        packing = pack(lengths, counts, *limits)
    return next_ones.first(len(packing.row)), packing


def assemble(
    threads: ThreadPoolExecutor,
    batch: Dict[str, np.ndarray],
    chosen: Upcoming,
    packing: Packing,
    mask: Optional[Callable] = None,
) -> None:
    """Writes the chosen samples into `batch`, where `packing` puts them, masked by `mask(samples, numbers,
    epoch=epochs)` if given."""
    per_row = batch["nsp_weights"].shape[1]
    order = np.argsort(packing.row * per_row + packing.place, kind="stable")
    rows = packing.row[order]
    chunk = max(1, CHUNK_TOKENS // batch["input_ids"].shape[1])

    def fill(first: int) -> None:
        part = {name: array[first : first + chunk] for name, array in batch.items()}
        here = order[np.searchsorted(rows, first) : np.searchsorted(rows, first + chunk)]
        samples = chosen.samples.take(chosen.index[here])
        if mask is not None:
            samples = mask(samples, chosen.numbers[here], epoch=chosen.epochs[here])
        if per_row == 1:
            fill_unpacked(part, samples)
        else:
            fill_packed(
                part,
                samples,
                packing.row[here] - first,
                packing.place[here],
                packing.start[here],
                packing.mask_start[here],
            )

    list(threads.map(fill, range(0, packing.rows, chunk)))


if __name__ == "__main__":
    main()
