"""The process behind `data.loading.loader.Loader`: assembles global batches in shared memory, ahead of training.

It gets the request of `Loader`, then [process, slot] as each process that it serves is done with a slot
(`data.subprocesses` and `data.loading.sharing` have the protocol). It sends all of them {"slot", "rows", "filled",
"counts", "position", "skipped"} for each finished batch ("filled": the number of rows of each part), or {"error",
"bad_input"} once, and ends. It imports neither torch nor anything that starts slowly.
"""

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np

from data.loading.loader import LoaderSettings
from data.loading.order import Order
from data.loading.ring import SlotRows, ring_slots
from data.loading.sharing import Clients
from data.loading.windows import NextSamples, ShardFiles, read_windows
from data.masking import Masking, choose_tokens, load_choice, mask_budget, mask_dynamic, masking_of
from data.packing import Packing, largest_prefix, one_a_row, pack
from data.rows import MLM, NSP, Arrays, Part, fill_packed, fill_unpacked, normalize_weights
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

    parts = [Part(*part) for part in request["parts"]]
    clients = Clients(request["listener"], len(parts), request["memory"], messages)

    def tell(message: Dict) -> None:
        reply(message)
        clients.reply(message)

    def run(work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            tell(error_message(error))
        os._exit(1)  # without waiting for threads, which may hang in a read

    def start() -> None:
        shards = [ShardInfo(**shard) for shard in request["shards"]]
        files = ShardFiles(shards, request["settings"]["skip_bad"], request["skipped"])
        threading.Thread(target=run, args=(watch, files), daemon=True).start()
        serve(request, files, parts, messages, tell)

    run(start)


def watch(files: ShardFiles) -> None:
    while True:
        files.check_unchanged()
        time.sleep(CHECK_SECONDS)


def serve(
    request: Dict, files: ShardFiles, parts: List[Part], messages: queue.Queue, tell: Callable[[Dict], None]
) -> None:
    """Fills slot after slot, as they get free, for ever. Raises InputError that names the file that cannot be used."""
    settings, info = LoaderSettings(**request["settings"]), files.shards[0]
    order = Order([shard.num_samples for shard in files.shards], settings.seed, info.sequence_length)
    stream = SampleStream(read_windows(files, order, request["position"], settings.workers))
    slot_rows = SlotRows(parts, settings.batch_size)
    slots = ring_slots(request["memory"], settings.layout(info, slot_rows.count), settings.slots)
    masking = masking_of(info, load_choice(request["choose"])) if info.masking == "dynamic" else None

    def mask(samples: Samples, numbers: np.ndarray, ends: np.ndarray) -> Samples:
        if masking is None or not len(samples):
            return samples
        return mask_dynamic(samples, numbers, settings.seed, (ends - 1) // order.num_samples, masking)

    with ThreadPoolExecutor(settings.workers) as threads:
        for number in free_slots(settings.slots, set(range(len(parts))), messages):
            chosen, packing = choose(stream, settings, info)
            rows = settings.batch_size if settings.packing == "rows" else packing.rows  # the last ones may be empty
            tokens = np.bincount(packing.row, chosen.get("lengths"), minlength=rows)
            places, filled = slot_rows.place(tokens)
            packing = packing._replace(row=places[packing.row])
            fill(threads, slots[number], filled, chosen, packing, mask)
            used = [{name: array[part.start : part.stop] for name, array in slots[number].items()} for part in filled]
            masked = sum(int(np.count_nonzero(batch[MLM.weights])) for batch in used)
            elsewhere = chosen.take(np.flatnonzero(packing.row < 0))
            masked += count_masked(threads, elsewhere, info, masking, mask)
            counts = {MLM.weights: masked, NSP.weights: len(packing.row)}
            for batch in used:
                normalize_weights(batch, counts)
            stream.advance(len(packing.row))
            tell(
                {
                    "slot": number,
                    "rows": rows,
                    "filled": list(map(len, filled)),
                    "counts": counts,
                    "position": int(chosen.ends[-1]),
                    "skipped": {files.shards[shard].path: why for shard, why in chosen.skipped.items()},
                }
            )


def free_slots(count: int, clients: Set[int], messages: queue.Queue) -> Iterator[int]:
    """One slot after the other that no client holds; each yielded is held by all then. A client that ended, as the
    message [client, None] says, holds none."""
    holders: Dict[int, Set[int]] = {slot: set() for slot in range(count)}
    while True:
        for slot in holders:
            if not holders[slot]:
                holders[slot] = set(clients)
                yield slot
        client, freed = messages.get()
        for slot in holders if freed is None else [freed]:
            holders[slot].discard(client)
        if freed is None:
            clients.discard(client)


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
    threads: ThreadPoolExecutor, slot: Arrays, filled: List[range], chosen: NextSamples, packing: Packing, mask: Mask
) -> None:
    """Writes into the rows `filled` of a slot the chosen samples that `packing` puts there, masked."""
    per_row = slot["nsp_weights"].shape[1]
    order = np.flatnonzero(packing.row >= 0)
    order = order[np.argsort((packing.row * per_row + packing.place)[order], kind="stable")]
    rows = packing.row[order]
    size = chunk_size(slot["input_ids"].shape[1])

    def fill_chunk(chunk: range) -> None:
        batch = {name: array[chunk.start : chunk.stop] for name, array in slot.items()}
        here = order[np.searchsorted(rows, chunk.start) : np.searchsorted(rows, chunk.stop)]
        samples = mask(chosen.samples.take(chosen.indices[here]), chosen.numbers[here], chosen.ends[here])
        if per_row == 1:
            fill_unpacked(batch, samples)
        else:
            fill_packed(batch, samples, packing.take(here), chunk.start)

    list(threads.map(fill_chunk, [part[at : at + size] for part in filled for at in range(0, len(part), size)]))


def count_masked(
    threads: ThreadPoolExecutor, chosen: NextSamples, info: ShardInfo, masking: Optional[Masking], mask: Mask
) -> int:
    """How many tokens of these samples are masked."""
    if masking is None:
        return int(chosen.get("mlm_counts").sum(dtype=np.int64))
    if masking.choose is choose_tokens:  # as many as it may
        lengths, first_lengths = chosen.get("lengths"), chosen.get("first_lengths")
        return int(mask_budget(lengths, first_lengths, masking.share, info.mask_tokens).sum(dtype=np.int64))
    size = chunk_size(info.sequence_length)

    def count_chunk(first: int) -> int:
        part = chosen.take(slice(first, first + size))
        masked = mask(part.samples.take(part.indices), part.numbers, part.ends)
        return int(masked.mlm_counts.sum(dtype=np.int64))

    return sum(threads.map(count_chunk, range(0, len(chosen.indices), size)))


def chunk_size(length: int) -> int:
    return max(1, CHUNK_TOKENS // length)


if __name__ == "__main__":
    main()
