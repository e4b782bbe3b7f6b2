"""The plan for CUDA or CPU: a micro-batch is measured on this machine, and scaled to a step and the whole run."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

from bert.config import Config, ParallelConfig
from bert.engines import find_device, make_engine, numa_nodes
from bert.engines.cores import Core, bind
from bert.engines.micro_batch import full_rows
from bert.engines.parallel.pipeline import ROUND
from bert.geometry import row_shape
from bert.plan.parallel import processes_of
from bert.plan.step import DataFacts, epochs_of, optimizer_name, run_name
from bert.text import count_of, duration

__all__ = ["Measured", "measure", "measured_report"]

ENOUGH_SECONDS, ENOUGH_TIMES = 2.0, 3


@dataclass(frozen=True)
class Measured:
    """What was measured, and where."""

    machine: str
    """Device, precision, micro-batches, in words."""
    rows: int
    """Of a micro-batch."""
    micro_batch: float
    """Seconds of its forward and backward pass."""
    update: float
    """Seconds of the optimizer's update."""
    nodes: Sequence[List[Core]] = ()
    """The cores of each NUMA node, where it was measured on the CPU."""


def measure(config: Config, rows_of_a_step: int) -> Measured:
    """Runs steps of one micro-batch of full rows, one sample each, on the device of `config`, from initial weights, in
    this process alone.

    Raises InputError where the device is not there, where not even one row fits it, and where `auto` finds IPUs that
    cannot run `config`.
    """
    config = dataclasses.replace(config, parallel=ParallelConfig())
    device, line = find_device(config)
    engine = make_engine(config, device)
    engine.expect_rows(rows_of_a_step)
    rows = engine.micro_batch_size = min(engine.micro_batch_size, rows_of_a_step)
    shape = row_shape(config, static=False)._replace(mask_slots=config.data.mask_tokens, samples=1)
    batch = full_rows(rows, shape, engine.task.targets)
    engine.measure(batch)  # the first compiles, and takes memory
    times: List[Dict[str, float]] = []
    while sum(sum(parts.values()) for parts in times) < ENOUGH_SECONDS and len(times) < ENOUGH_TIMES:
        times.append(engine.measure(batch))
    seconds = {part: sum(parts[part] for parts in times) / len(times) for part in times[0]}
    update = seconds.pop("optimizer", 0.0)
    return Measured(f"{line}, {engine.describe()}", rows, sum(seconds.values()), update, numa_nodes(device))


def measure_on(cores: Sequence[Core], config: Config, rows_of_a_step: int) -> Measured:
    """`measure` on these cores alone, a thread each, in a process of its own: so memory is near them too."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=bind, initargs=(cores,)) as process:
        return process.submit(measure, config, rows_of_a_step).result()


def numa_lines(config: Config, measured: Measured, rows_of_a_step: int) -> List[str]:
    """On a CPU of several NUMA nodes: whether a process on each is faster than one on all."""
    if len(measured.nodes) < 2:
        return []
    count, smallest = len(measured.nodes), min(measured.nodes, key=len)
    one = measure_on(smallest, config, rows_of_a_step)
    together, all_cores = count * one.rows / one.micro_batch, measured.rows / measured.micro_batch
    rates = f"{count} x {rounded(together / count)} = {rounded(together)} rows/s"
    line = f"measured with {count_of(len(smallest), 'core')} of one of {count} NUMA nodes: {rates}; with all cores: "
    better = f"Faster: torchrun --nproc-per-node {count} run_pretraining.py ... (docs/scaling.md)"
    slower = "One process is as fast as one on each node"
    return [f"  {line}{rounded(all_cores)}. {better if together > all_cores else slower}"]


def rows_and_samples(config: Config, facts: DataFacts) -> Tuple[int, int]:
    """Of a step."""
    batch, packing = config.training.global_batch_size, config.data.packing
    per_row = (facts.per_row or 1.0) if packing != "off" else 1.0
    rows = batch if packing in ("off", "rows") else max(1, round(batch / per_row))
    return rows, int(rows * per_row) if packing == "rows" else batch


def measured_report(config: Config, facts: DataFacts, why_not_ipu: str) -> List[str]:
    """The plan in lines for people; `why_not_ipu` says why it is not for IPUs, if the config leaves that open."""
    packing, steps = config.data.packing, config.training.max_steps
    rows, samples = rows_and_samples(config, facts)
    per_row = (facts.per_row or 1.0) if packing != "off" else 1.0
    measured = measure(config, rows)
    micro_batches = -(-rows // measured.rows)
    step = micro_batches * measured.micro_batch + measured.update

    how = "one a row" if facts.per_row or packing == "off" else "taken as one a row"
    if per_row > 1:
        how = f"{per_row:.2f} a row, as the first of data.files pack"
    tokens = f"of {config.data.sequence_length} tokens"
    all_rows = f"{rows:,} rows {tokens}, {count_of(micro_batches, 'micro-batch', 'micro-batches')}"
    full_rows, update = count_of(measured.rows, "full row"), f"{measured.update:.3f} s"
    both = f"{measured.micro_batch:.3f} s forward and backward, {optimizer_name(config)}'s update {update}"
    total = f"{micro_batches:,} x {measured.micro_batch:.3f} s + {update} = {rounded(step)} s"
    missing = "with shards there, the plan says how they share rows, and how many epochs the run is"
    lines = [
        f"Plan of {run_name(config)} on this machine: {measured.machine}",
        why_not_ipu and f"  not for IPUs: {why_not_ipu}",
        f"  a step: {samples:,} samples, {how}: {all_rows}",
        facts.missing and f"  {facts.missing}: {missing}",
        f"  measured: a micro-batch of {full_rows} {tokens} {both}",
        f"  a step: {total}, {rounded(samples / step)} sequences/s",
        f"  the whole run, {steps:,} steps, {steps * samples:,} samples: about {duration(steps * step)}"
        f"{epochs_of(steps * samples, facts)}",
        *processes_lines(config, measured, rows),
        *numa_lines(config, measured, rows),
        "  Not counted: reading data, checkpoints, evaluation. Rows that are not full are faster, where no padding is "
        "computed.",
    ]
    return [line for line in lines if line]


def processes_lines(config: Config, measured: Measured, rows: int) -> List[str]:
    """How long a step takes on all processes of the run, if sending takes no time; nothing for a process alone."""
    size, parallel = processes_of(config)[0], config.parallel
    if size == 1:
        return []
    micro_batches = -(-rows * parallel.pipeline // (size * measured.rows))
    rounds = -(-micro_batches // (ROUND * parallel.pipeline))
    filling = rounds * (parallel.pipeline - 1) / parallel.stages_per_process
    passes = (micro_batches + filling) * measured.micro_batch / parallel.pipeline
    step = passes + measured.update / (parallel.pipeline if parallel.shard == "none" else size)
    return [
        f"  on {size} processes, if sending takes no time: {rounded(step)} s a step, the whole run about "
        f"{duration(config.training.max_steps * step)}"
    ]


def rounded(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
