"""Samples/s and GB/s of the loader, and in the same run of what others use: torch's DataLoader over h5py, and NVIDIA
BERT's way.

    python benchmarks/loader.py                              # on a synthetic data set, made in a temporary folder
    python benchmarks/loader.py --files 'shards/train-*.h5'  # on real shards
    python benchmarks/loader.py --ranks 1 2 4 8              # for so many processes of a machine

GB/s count a sample as it is in a shard of this project. "cold" drops the files from the page cache first; files on
tmpfs cannot be dropped, so it is left out there. NVIDIA's way is measured on a shard in its own format, gzip and all:
the seconds to read it whole, and those to hand out all its samples, extrapolated from the measured ones.

With --ranks processes take their parts of the same batches as fast as they can: from one loader that they share; each
from a loader of its own that assembles whole batches; and, as users of torch do, each from a DataLoader (1 worker) with
a DistributedSampler. samples/s are those of all processes together; CPU seconds and memory (the peak of resident
bytes) are those of the loaders' processes, in which the ring of batches is counted once.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.processes import Worker
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.synthetic import write_data_set
from bert.text import count_of
from data.foreign.bert_layout import BERT_FEATURES
from data.foreign.nvidia import write_nvidia
from data.loading.loader import Loader, LoaderSettings
from data.loading.ring import SlotRows, ring_bytes
from data.loading.shard_files import open_shards
from data.loading.sharing import LocalRanks, connect, listen
from data.rows import WHOLE, Part
from data.samples import FIELDS, layout
from data.shards import expand, read_samples


class H5pyDataset(torch.utils.data.Dataset):
    """A sample at a time out of HDF5, as most pre-training scripts do it."""

    def __init__(self, shards):
        self.shards, self.files = shards, None
        self.ends = np.cumsum([shard.num_samples for shard in shards])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        if self.files is None:  # opened in the worker
            self.files = [h5py.File(shard.path, "r") for shard in self.shards]
        number = int(np.searchsorted(self.ends, index, side="right"))
        file, row = self.files[number], index - int(self.ends[number]) + self.shards[number].num_samples
        return sample_tensors(*(file[name][row] for name in FIELDS))


class WholeShardDataset(torch.utils.data.Dataset):
    """NVIDIA BERT's way: a shard in its own format is read whole, then handed out a sample at a time."""

    def __init__(self, path):
        with h5py.File(path, "r") as file:
            self.arrays = [np.asarray(file[name][:]) for name in BERT_FEATURES]

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        fields = (np.asarray(array[index], np.int64) for array in self.arrays)
        ids, mask, segments, positions, labels, nsp = map(torch.from_numpy, fields)
        unused = (positions == 0).nonzero()
        count = unused[0].item() if len(unused) else len(positions)
        dense = torch.full(ids.shape, -1)
        dense[positions[:count]] = labels[:count]
        return ids, segments, mask, dense, nsp


def sample_tensors(ids, length, first, positions, labels, count, nsp):
    """A model's input: input ids, segment ids, input mask, MLM labels (-1 where not masked), next sentence label."""
    slots = np.arange(len(ids))
    dense = np.full(len(ids), -1, np.int64)
    dense[positions[:count]] = labels[:count]
    inside = slots < length
    return (
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(((slots >= first) & inside).astype(np.int64)),
        torch.from_numpy(inside.astype(np.int64)),
        torch.from_numpy(dense),
        torch.tensor(int(nsp)),
    )


def loader_settings(arguments, packing="samples"):
    return LoaderSettings(arguments.batch_size, 0, packing, workers=arguments.workers)


def open_loader(arguments, shards, packing):
    return Loader(shards, loader_settings(arguments, packing))


def measure_loader(arguments, shards, packing):
    with open_loader(arguments, shards, packing) as loader:
        for _ in range(4):  # the first batches wait for a window, and were made ahead
            loader.next()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < arguments.seconds:
            count += loader.next().samples
        return count / (time.perf_counter() - began)


def measure_cold(arguments, shards):
    """Samples/s from the start of the loader through one epoch (at most 32 batches) that is not in the page cache."""
    for shard in shards:
        with open(shard.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total = sum(shard.num_samples for shard in shards)
    began, count = time.perf_counter(), 0
    with open_loader(arguments, shards, "samples") as loader:
        for _ in range(max(1, min(32, total // arguments.batch_size))):
            count += loader.next().samples
    return count / (time.perf_counter() - began)


def measure_data_loader(dataset, batch_size, workers, seconds):
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=False))
    next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch[0])
        if time.perf_counter() - began > seconds:
            break
    rate = count / (time.perf_counter() - began)
    del batches
    return rate


def measure_whole_shard(path, seconds):
    began = time.perf_counter()
    dataset = WholeShardDataset(path)
    reading = time.perf_counter() - began
    return len(dataset) / (reading + len(dataset) / measure_data_loader(dataset, 256, 0, seconds))


class Rank:
    """One of several processes that take their parts of the same batches; `open` says how."""

    def __init__(self, arguments, rank, ranks):
        self.arguments, self.rank, self.ranks = arguments, rank, ranks
        self.shards, self.part, self.batches = open_shards(arguments.files), Part(rank, ranks), None
        self.pids = []  # of the loader's processes, if they are this process's

    def listen(self):
        self.endpoint, address = listen()
        return address

    def open_shared(self, address):
        if self.rank:
            self.endpoint = connect(address, self.rank)
        local = LocalRanks([Part(rank, self.ranks) for rank in range(self.ranks)], self.rank, self.endpoint)
        self.loader, self.part = Loader(self.shards, loader_settings(self.arguments), local=local), WHOLE
        self.endpoint.close()
        self.pids = [] if self.rank else [self.loader._process.process.pid]

    def open_own(self, _):
        self.loader = open_loader(self.arguments, self.shards, "samples")
        self.pids = [self.loader._process.process.pid]

    def open_torch(self, _):
        dataset = H5pyDataset(self.shards)
        sampler = torch.utils.data.DistributedSampler(dataset, self.ranks, self.rank)
        self.batches = iter(torch.utils.data.DataLoader(dataset, 256, sampler=sampler, num_workers=1))
        self.pids = [worker.pid for worker in self.batches._workers]

    def take(self, count):
        """Takes `count` batches; returns the samples that the global ones have, or of torch's this process's own."""
        samples = 0
        for _ in range(count):
            if self.batches:
                samples += len(next(self.batches)[0])
            else:
                batch = self.loader.next()
                self.part.of(batch.arrays)
                samples += batch.samples
        return samples

    def usage(self):
        """Peak bytes of memory and seconds of processor time of its loader's processes."""
        return [sum(values) for values in zip(*map(usage_of, self.pids))] or [0, 0]


def usage_of(pid):
    with open(f"/proc/{pid}/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    with open(f"/proc/{pid}/stat") as file:
        ticks = sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13]))
    return peak, ticks / os.sysconf("SC_CLK_TCK")


def measure_ranks(arguments, ranks, way):
    """(samples/s, processor seconds per million samples, peak memory in bytes)"""
    workers = [Worker(Rank, arguments, rank, ranks) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:

        def ask(function, *values):
            return list(threads.map(lambda worker: worker.ask(function, *values), workers))

        try:
            address = workers[0].ask(Rank.listen) if way == "open_shared" else None
            ask(getattr(Rank, way), address)
            few = 1 if way == "open_torch" else 6  # more than are made ahead
            ask(Rank.take, few)
            began = time.perf_counter()
            ask(Rank.take, few)
            count = max(few, int(few * arguments.seconds / (time.perf_counter() - began)))
            _, busy = map(sum, zip(*ask(Rank.usage)))
            began = time.perf_counter()
            taken = ask(Rank.take, count)
            samples, seconds = sum(taken) if way == "open_torch" else taken[0], time.perf_counter() - began
            peak, busy_after = map(sum, zip(*ask(Rank.usage)))
            return samples / seconds, (busy_after - busy) / samples * 1e6, peak
        finally:
            threads.map(Worker.__exit__, workers)


def run_ranks(arguments):
    info = open_shards(arguments.files)[0]
    settings = loader_settings(arguments)
    ways = {"shared loader": "open_shared", "a loader each": "open_own", "DataLoader each": "open_torch"}
    rounds = {}
    for _ in range(arguments.rounds):
        for ranks in arguments.ranks:
            for name, way in ways.items():
                rounds.setdefault((ranks, name), []).append(measure_ranks(arguments, ranks, way))
    rows, results = [], []
    for (ranks, name), values in rounds.items():
        whole = ring_bytes(settings.layout(info, arguments.batch_size), settings.slots)
        parts = SlotRows([Part(rank, ranks) for rank in range(ranks)], arguments.batch_size).count
        ring = {
            "shared loader": ring_bytes(settings.layout(info, parts), settings.slots),
            "a loader each": ranks * whole,
        }.get(name, 0)
        rate, busy, peak = (median(column) for column in zip(*values))
        figures = dict(samples_per_second=rate, cpu_seconds_per_million=busy, ring_bytes=ring, peak_bytes=peak)
        results.append({"ranks": ranks, "way": name, **figures, "rounds": values})
        rows.append([f"{ranks}, {name}", f"{rate:,.0f}", f"{busy:.2f}", f"{ring / 1e6:,.0f}", f"{peak / 1e6:,.0f}"])
    print(f"global batch {arguments.batch_size:,}; medians of {count_of(arguments.rounds, 'round')}")
    print_table(["ranks", "samples/s", "CPU s a million", "ring, MB", "all memory, MB"], rows)
    write_json(arguments.json, {"batch_size": arguments.batch_size, "ranks": results}, torch=torch.__version__)


def in_memory(path):
    """Whether a file lies on a file system that is the page cache itself."""
    with open("/proc/mounts") as lines:
        kinds = {fields[1]: fields[2] for fields in map(str.split, lines)}
    folder = os.path.realpath(path)
    while folder not in kinds:
        folder = os.path.dirname(folder)
    return kinds[folder] in ("tmpfs", "ramfs")


def run(arguments, folder):
    shards = open_shards(arguments.files)
    info = shards[0]
    fields = layout(info.sequence_length, info.mask_tokens, info.vocab_size).values()
    size = sum(int(np.prod(shape, dtype=int)) * dtype.itemsize for shape, dtype in fields)
    nvidia_shard = os.path.join(folder, "nvidia.hdf5")
    write_nvidia(nvidia_shard, [read_samples(shards[0].path, 0, shards[0].num_samples)])
    ways = {
        "loader, packed": lambda: measure_loader(arguments, shards, "samples"),
        "loader, packed, fixed rows": lambda: measure_loader(arguments, shards, "rows"),
        "loader, one sample a row": lambda: measure_loader(arguments, shards, "off"),
        "loader, packed, cold": lambda: measure_cold(arguments, shards),
        "DataLoader over h5py, 0 workers": lambda: measure_data_loader(H5pyDataset(shards), 256, 0, arguments.seconds),
        "DataLoader over h5py, 2 workers": lambda: measure_data_loader(H5pyDataset(shards), 256, 2, arguments.seconds),
        "NVIDIA BERT's way": lambda: measure_whole_shard(nvidia_shard, arguments.seconds),
    }
    if any(in_memory(shard.path) for shard in shards):
        del ways["loader, packed, cold"]
        print("cold is not measured: the shards are on tmpfs, in memory")
    rounds = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, measure in ways.items():
            rounds[name].append(measure())
    rates = {name: median(values) for name, values in rounds.items()}
    total = sum(shard.num_samples for shard in shards)
    print(f"{total:,} samples of length {info.sequence_length}, {size} bytes each")
    print(f"global batch {arguments.batch_size:,}; medians of {count_of(arguments.rounds, 'round')}")
    rows = []
    for name, rate in rates.items():
        rows.append([name, f"{rate:,.0f}", f"{rate * size / 1e9:.3f}", f"{rates['loader, packed'] / rate:.1f}"])
    print_table(["", "samples/s", "GB/s", "loader is faster by"], rows)
    results = {
        "bytes_per_sample": size,
        "batch_size": arguments.batch_size,
        "sequence_length": info.sequence_length,
        "samples_per_second": rates,
        "rounds": rounds,
    }
    versions = {"torch": torch.__version__, "h5py": h5py.__version__, "numpy": np.__version__}
    write_json(arguments.json, results, **versions)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--files", nargs="+", help="shards: paths or globs; by default a synthetic data set")
    synthetic = "of the synthetic data set (default: %(default)s)"
    parser.add_argument("--samples", type=int, default=1048576, help=f"size {synthetic}")
    parser.add_argument("--sequence-length", type=int, default=128, help=synthetic)
    parser.add_argument("--mask-tokens", type=int, default=20, help=synthetic)
    parser.add_argument("--batch-size", type=int, default=65536, help="global batch, in samples (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads of the loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", help="measure loading for so many processes instead")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.files is None:
            sizes = arguments.sequence_length, arguments.mask_tokens, 30522
            arguments.files = [write_data_set(folder, "wikipedia", arguments.samples, *sizes)]
        arguments.files = expand(arguments.files)
        if arguments.ranks:
            run_ranks(arguments)
        else:
            run(arguments, folder)


if __name__ == "__main__":
    main()
