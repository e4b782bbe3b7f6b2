"""Weak and strong scaling: sequences/s of 1, 2, 4, ... processes, what of a step is reduction and waiting, and memory.

    python benchmarks/scaling.py --config pod16_phase1.json --processes 1 2 --json scaling.json --plot scaling.png
    python benchmarks/scaling.py --config gpu_phase1.json --processes 1 2 4 8 --parallel.shard optimizer
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/scaling.py --config gpu_phase1.json --json 32.json
    python benchmarks/scaling.py --of 8.json 16.json 32.json --plot scaling.png
    python benchmarks/scaling.py --predict

Options are run_pretraining.py's, and those below. Run plainly, it starts torchrun on this machine for each number of
processes, in turns; under torchrun, on one machine or many, it measures the processes that there are. `--of` puts
several results into one table. Samples are random.

Weak: a step has --samples for each process. Strong: it has --samples for all together. Efficiency is the rate of
sequences against that of one process, per GPU; on CPUs against one process with all threads, per machine.

A step is measured twice: with all processes together, and apart, in which each does its own rows with the whole model
and without communication, at the same time as the others. What it takes longer together is reduction and waiting for
each other, and a pipeline's bubble; with parallel.shard, what the update is shorter is taken off. It is shown as a
share of the step that was measured, and of one of the config's global batch, where it and the update are still once a
step.

Peak memory is of the step with all together: CUDA's allocated memory, or on the CPU what the process has more than
before the engine was made, some 0.2 GB of libraries among it. It stands beside the formula of bert/plan/parallel.py.
"""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.pretraining import make_batch
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.synthetic import length_distribution, random_samples
from benchmarks.timing import Stopwatch, cuda_or_cpu, device_name, timed
from bert.command_line import parse_command_line
from bert.config import ParallelConfig
from bert.engines import expected_of_torch, make_engine, part_of, process_of
from bert.engines.parallel.processes import current, joined
from bert.engines.parallel.reduction import BUCKET_BYTES
from bert.plan.parallel import Workload, memory_of_ranks
from data.errors import InputError

MODES = ("weak", "strong")

# What a prediction is made from. The rate and the update are the speed budget of one H200, which nobody has measured.
BUDGET_RATE, BUDGET_UPDATE = 5600.0, 1.3e-3  # sequences/s in phase 1; seconds
PARAMETERS, GLOBAL_BATCH, MICRO_BATCH = 110_106_428, 65_536, 1024  # BERT-base; phase 1
NODE, NVLINK, HOP = 8, 450e9, 5e-6  # GPUs of a node; bytes/s each way of a GPU; seconds of a message's way
REACHED = 0.7  # of a link's rate, by rings: an assumption
LINKS = {  # name -> bytes/s each way between nodes, of a node; None: NVLink everywhere
    "NVLink, 900 GB/s a GPU": None,
    "400 Gb/s a GPU": NODE * 400e9 / 8,
    "25 Gb/s a node": 25e9 / 8,
}
GPUS = (1, 8, 16, 64, 256, 1024)


def reduction_seconds(gpus, link):
    """Of an all-reduce of all gradients, float32: rings in each node, then between the nodes, through their links; and
    for each bucket the latency of a tree, there and back."""
    sent = 4 * PARAMETERS
    inside, nodes = min(gpus, NODE if link else gpus), math.ceil(gpus / NODE) if link else 1
    seconds = 2 * (inside - 1) / inside * sent / (REACHED * NVLINK)
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * sent / (REACHED * link)
    return seconds + math.ceil(sent / BUCKET_BYTES) * 2 * math.ceil(math.log2(gpus)) * HOP


def predicted(gpus, link, batch=GLOBAL_BATCH):
    """(sequences/s, efficiency) of a step of `batch` samples: passes, what of the reduction the last backward pass (two
    thirds of a micro-batch) does not hide, update."""
    passes = batch / gpus / BUDGET_RATE
    hidden = 2 / 3 * min(passes, MICRO_BATCH / BUDGET_RATE)
    step = passes + max(0.0, reduction_seconds(gpus, link) - hidden) + BUDGET_UPDATE
    alone = batch / (batch / BUDGET_RATE + BUDGET_UPDATE)
    return batch / step, batch / step / (gpus * alone)


def prediction_rows():
    """The table of docs/scaling.md, cells of text."""
    rows = [["GPUs", *LINKS]]
    for gpus in GPUS:
        cells = [predicted(gpus, link) for link in LINKS.values()]
        rows.append([f"{gpus:,}", *(f"{rate:,.0f} ({100 * efficiency:.0f} %)" for rate, efficiency in cells)])
    return rows


def resident_bytes(field):
    """VmRSS, what this process has in memory, or VmHWM, the most that it ever had."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Way:
    """Steps on this process's rows of batches, by name, with an engine of its own."""

    def __init__(self, device, config, batches):
        self.device, self.before = device, resident_bytes("VmRSS")
        self.engine = make_engine(config, device)
        self.batches = batches
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of the search for a micro-batch

    def seconds(self, batch, steps):
        """Of a step, in `steps` each; the first is not counted: it compiles, and makes the optimizer's state."""
        engine, rows = self.engine, self.batches[batch]
        engine.expect_rows(len(rows["input_ids"]))

        def step():
            engine.step(rows, 1e-4, engine.steps_done + 1)

        step()
        return [timed(self.device, step) for _ in range(steps)]

    def update_seconds(self, batch):
        """Of the update in a further step."""
        engine, watch = self.engine, Stopwatch(self.device)
        engine.update = watch.around("update", engine.update)
        engine.step(self.batches[batch], 1e-4, engine.steps_done + 1)
        return watch.seconds["update"]

    def peak_bytes(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.before


def formula_bytes(config, rank, size, micro_batch, rows):
    """Peak memory of process `rank`, as the plan has it."""
    precision, _, logit_bytes, packs = expected_of_torch(config)
    copies = max(1, size // config.parallel.pipeline)
    tokens, masked = [micro_batch * slots for slots in (config.data.sequence_length, config.data.mask_tokens)]
    work = Workload(precision, copies, max(1, rows // micro_batch), tokens, masked, logit_bytes, packs)
    return memory_of_ranks(config, work)[rank // copies].total


def measure(own, config, device):
    """Figures of all processes, in the first of them; None in the others."""
    rank, size = process_of(device)
    data, counts = config.data, {"weak": own.samples * size, "strong": own.samples}
    samples = random_samples(
        own.lengths, own.samples * size, data.sequence_length, data.mask_tokens, config.model.vocab_size,
        np.random.default_rng(0),
    )  # fmt: skip
    part = part_of(config, device)
    batches = {mode: part.of(make_batch(config, samples.take(slice(count)))) for mode, count in counts.items()}
    with joined(device, config.parallel.timeout):
        store = current().store if current() else None
        way = Way(device, config, batches)
        figures = {mode: {"together": way.seconds(mode, own.steps)} for mode in MODES[: 1 + (size > 1)]}
        micro_batch, peak, settings = way.engine.micro_batch_size, way.peak_bytes(), way.engine.describe()
        update = way.update_seconds("weak")
    del way
    gc.collect()
    if size > 1:
        training = dataclasses.replace(config.training, micro_batch_size=micro_batch)
        way = Way(device, dataclasses.replace(config, parallel=ParallelConfig(), training=training), batches)
        for mode in figures:
            store.add(f"ready for {mode}", 1)
            while store.add(f"ready for {mode}", 0) < size:
                time.sleep(0.01)
            figures[mode]["apart"] = way.seconds(mode, own.steps)
    mine = {
        "figures": figures,
        "update": update,
        "peak_bytes": peak,
        "formula_bytes": formula_bytes(config, rank, size, micro_batch, len(batches["weak"]["input_ids"])),
    }
    if rank:
        store.set(f"figures {rank}", json.dumps(mine))
        while not store.check(["all figures are read"]):  # torchrun ends all as soon as the first is gone
            time.sleep(0.05)
        return None
    others = [json.loads(store.get(f"figures {other}")) for other in range(1, size)]
    if store is not None:
        store.set("all figures are read", "1")
    units = size if device == "cuda" else size // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    about = {"processes": size, "units": units, "device": device_name(device), "settings": settings}
    batch = {"samples": counts, "global_batch": config.training.global_batch_size}
    parallel = {"shard": config.parallel.shard, "pipeline": config.parallel.pipeline}
    return {**about, **batch, **parallel, "ranks": [mine, *others]}


def start(own, options, processes, path):
    """Measures so many processes of this machine, by torchrun; the result is in the file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [os.path.abspath(__file__), "--samples", str(own.samples), "--lengths", str(own.lengths)]
    command += ["--steps", str(own.steps), "--json", path, *options]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)  # its own table
    if done.returncode:
        sys.exit(f"error: {processes} processes ended with exit status {done.returncode}; see above")
    return read(path)


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["results"]["runs"]


def summarize(runs):
    """The medians of runs of the same number of processes, which may have been measured in several rounds."""
    run, ranks = dict(runs[0]), [rank for each in runs for rank in each["ranks"]]
    summary = {name: run[name] for name in ("processes", "units", "device", "settings", "samples", "shard")}
    summary["peak_bytes"] = max(rank["peak_bytes"] for rank in ranks)
    summary["formula_bytes"] = max(rank["formula_bytes"] for rank in run["ranks"])
    update = median([rank["update"] for rank in ranks])
    for mode in ranks[0]["figures"]:
        together = median([seconds for rank in ranks for seconds in rank["figures"][mode]["together"]])
        apart = [seconds for rank in ranks for seconds in rank["figures"][mode].get("apart", [])]
        waiting = together - median(apart) / run["pipeline"] if apart else 0.0
        samples, once = run["samples"][mode], update + max(0.0, waiting)
        at_batch = (together - once) / samples + once / run["global_batch"]
        summary[mode] = {
            "seconds": together,
            "waiting": waiting / together,
            "rate": samples / together,
            "rate_at_batch": 1 / at_batch,
            "waiting_at_batch": max(0.0, waiting) / run["global_batch"] / at_batch,
        }
    summary.setdefault("strong", summary["weak"])
    return summary


def report(own, runs):
    """Prints, draws and writes runs of one or several numbers of processes."""
    numbers = sorted({run["processes"] for run in runs})
    summaries = [summarize([run for run in runs if run["processes"] == number]) for number in numbers]
    base, rows = summaries[0], []
    for summary in summaries:
        for mode in MODES[: 1 + (summary["processes"] > 1)]:
            figures, first = summary[mode], base[mode]
            for name in ("rate", "rate_at_batch"):
                share = figures[name] / first[name] * base["units"] / summary["units"]
                figures[name.replace("rate", "efficiency")] = share
            cells = [f"{figures['rate']:.4g}", percent(figures["efficiency"]), percent(figures["waiting"])]
            cells += [f"{figures['rate_at_batch']:.4g}", percent(figures["efficiency_at_batch"])]
            cells += [percent(figures["waiting_at_batch"], 2)]
            memory = [f"{summary[name] / 1e9:.2f}" for name in ("peak_bytes", "formula_bytes")]
            rows.append([f"{summary['processes']} {mode}", f"{summary['samples'][mode]:,}", *cells, *memory])
    for summary in summaries:
        print(f"{summary['processes']}: {summary['device']}, {summary['settings']}; shard {summary['shard']}")
    header = ["processes", "samples", "sequences/s", "efficiency", "reduction, waiting"]
    header += ["at the config's batch", "efficiency", "reduction, waiting", "peak, GB", "formula, GB"]
    print_table(header, rows)
    if own.plot:
        from benchmarks.plot import draw_lines

        lines = {mode: {s["processes"]: 100 * s[mode]["efficiency"] for s in summaries} for mode in MODES}
        draw_lines(own.plot, "efficiency, %", "processes", lines)
    write_json(own.json, {"runs": runs, "summaries": summaries}, torch=torch.__version__)


def percent(share, digits=1):
    return f"{100 * share:.{digits}f} %"


def run(own, options):
    if own.predict:
        header, *rows = prediction_rows()
        print_table(header, rows)
        return
    if own.of:
        report(own, [run for path in own.of for run in read(path)])
        return
    config = parse_command_line(options)
    device = cuda_or_cpu(config)
    own.samples = own.samples or (32 if device == "cpu" else 4096)
    if "LOCAL_RANK" in os.environ:
        result = measure(own, config, device)
        if result:
            report(own, [result])
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(own.rounds):
            for processes in own.processes:
                runs += start(own, options, processes, os.path.join(folder, "run.json"))
    report(own, runs)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--samples", type=int, help="of a process in a step (default: 32 on the CPU, 4096 on CUDA)")
    parser.add_argument(
        "--lengths", type=length_distribution, default="wikipedia", metavar="full|MEAN|wikipedia", help="of the samples"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the numbers take turns (default: %(default)s)")
    parser.add_argument("--of", nargs="+", metavar="FILE", help="show these results together, and measure nothing")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the efficiency: a PNG file")
    parser.add_argument("--predict", action="store_true", help="print the prediction of docs/scaling.md")
    own, others = parser.parse_known_args()
    try:
        run(own, others)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
