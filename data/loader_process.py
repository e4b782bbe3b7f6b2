"""The process behind `data.loader.Loader`: reads, shuffles and assembles global batches into shared memory, ahead of training.

It speaks JSON lines. In: the settings (a dict), then the number of each slot that may be filled. Out: {"slot", "samples",
"masked_tokens"} for each finished batch, or {"error", "bad_input"} once, then it ends. It ends too when its parent does.
It imports neither torch nor anything that starts slowly.
"""

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
from typing import Callable, Dict

import numpy as np

from data.errors import InputError
from data.order import Order
from data.ring import ring_bytes, ring_slots
from data.rows import batch_layout, fill_unpacked, weigh
from data.shards import Samples, ShardInfo
from data.windows import ShardFiles, read_windows

__all__ = ["main"]

CHUNK_TOKENS = 2 ** 16  # tokens that a thread gathers at a time: they stay in its cache on their way to the slot


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

    def say(**message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        serve(settings, free, say)
    except InputError as error:
        say(error=str(error), bad_input=True)
    except BaseException:
        say(error=traceback.format_exc(), bad_input=False)
    os._exit(1)  # no waiting for threads that may hang in a read


def listen(free: "queue.Queue") -> None:
    for line in sys.stdin:
        free.put(json.loads(line))
    os._exit(0)


def exit_with_parent(parent: int) -> None:
    # The end of stdin says so at once, unless another process that the parent forked holds the pipe open.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def serve(settings: Dict, free: "queue.Queue", say: Callable) -> None:
    """Fills slot after slot, as they get free, for ever. Raises InputError that names the file that cannot be used."""
    files = ShardFiles([ShardInfo(**shard) for shard in settings["shards"]])
    info, batch_size, workers = files.shards[0], settings["batch_size"], settings["workers"]
    order = Order([shard.num_samples for shard in files.shards], settings["seed"], info.sequence_length)
    windows = read_windows(files, order, settings["samples_seen"], workers)
    layout = batch_layout(batch_size, info.sequence_length, info.mask_tokens, 1)
    memory = mmap.mmap(settings["memory"], ring_bytes(layout, settings["slots"]))
    slots = ring_slots(memory, layout, settings["slots"])
    rows = np.empty(0, np.int64)
    with ThreadPoolExecutor(workers) as assemblers:
        while True:
            slot, filled = free.get(), 0
            files.check_unchanged()
            while filled < batch_size:
                if len(rows) == 0:
                    samples, rows = next(windows)
                now, rows = rows[:batch_size - filled], rows[batch_size - filled:]
                assemble(assemblers, slots[slot], filled, samples, now)
                filled += len(now)
            masked_tokens, _ = weigh(slots[slot])
            say(slot=slot, samples=batch_size, masked_tokens=masked_tokens)


def assemble(threads: ThreadPoolExecutor, batch: Dict[str, np.ndarray], first: int, samples: Samples, rows: np.ndarray) -> None:
    """Writes the samples at `rows` into the rows of `batch` from `first` on."""
    chunk = max(1, CHUNK_TOKENS // samples.input_ids.shape[1])

    def fill(at: int) -> None:
        chosen = samples.take(rows[at:at + chunk])
        fill_unpacked({name: array[first + at:first + at + len(chosen)] for name, array in batch.items()}, chosen)

    list(threads.map(fill, range(0, len(rows), chunk)))


if __name__ == "__main__":
    main()
