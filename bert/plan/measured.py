"""The plan for CUDA or CPU: a micro-batch is measured on this machine, and scaled to a step and the whole run."""

from dataclasses import dataclass
from typing import Dict, List

from bert.config import Config
from bert.engines import find_device, make_engine
from bert.engines.micro_batch import full_rows
from bert.geometry import row_shape
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


def measure(config: Config, rows_of_a_step: int) -> Measured:
    """Runs steps of one micro-batch of full rows, one sample each, on the device of `config`, from initial weights.

    Raises InputError where the device is not there, where not even one row fits it, and where `auto` finds IPUs that
    cannot run `config`.
    """
    device, line = find_device(config)
    engine = make_engine(config, device)
    engine.expect_rows(rows_of_a_step)
    rows = engine.micro_batch_size = min(engine.micro_batch_size, rows_of_a_step)
    batch = full_rows(rows, row_shape(config, static=False)._replace(mask_slots=config.data.mask_tokens, samples=1))
    engine.measure(batch)  # the first compiles, and takes memory
    times: List[Dict[str, float]] = []
    while sum(sum(parts.values()) for parts in times) < ENOUGH_SECONDS and len(times) < ENOUGH_TIMES:
        times.append(engine.measure(batch))
    seconds = {part: sum(parts[part] for parts in times) / len(times) for part in times[0]}
    update = seconds.pop("optimizer", 0.0)
    return Measured(f"{line}, {engine.describe()}", rows, sum(seconds.values()), update)


def measured_report(config: Config, facts: DataFacts, why_not_ipu: str) -> List[str]:
    """The plan in lines for people; `why_not_ipu` says why it is not for IPUs, if the config leaves that open."""
    batch, packing, steps = config.training.global_batch_size, config.data.packing, config.training.max_steps
    per_row = (facts.per_row or 1.0) if packing != "off" else 1.0
    rows = batch if packing in ("off", "rows") else max(1, round(batch / per_row))
    samples = int(rows * per_row) if packing == "rows" else batch
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
        "  Not counted: reading data, checkpoints, evaluation. Rows that are not full are faster, where no padding is "
        "computed.",
    ]
    return [line for line in lines if line]


def rounded(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
