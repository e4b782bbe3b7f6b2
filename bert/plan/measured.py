"""The plan for CUDA or CPU, which is measured on this machine."""

from typing import List

from bert.config import Config
from bert.plan.measure import measure
from bert.plan.optimizer import name_of_optimizer
from bert.plan.step import DataFacts, epochs_of, name_of_run
from bert.text import count_of, duration

__all__ = ["measured_report"]


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
    length = config.data.sequence_length
    all_rows = f"{rows:,} rows of {length} tokens, {count_of(micro_batches, 'micro-batch', 'micro-batches')}"
    full_rows = f"{count_of(measured.rows, 'full row')} of {length} tokens"
    forward_backward, update = f"{measured.micro_batch:.3f} s", f"{measured.update:.3f} s"
    both = f"{forward_backward} forward and backward, {name_of_optimizer(config)}'s update {update}"
    total = f"{micro_batches:,} x {forward_backward} + {update} = {rounded(step)} s"
    run = f"the whole run, {steps:,} steps, {steps * samples:,} samples"
    missing = "with shards there, the plan says how they share rows, and how many epochs the run is"
    return [
        f"Plan of {name_of_run(config)} on this machine: {measured.machine}",
        *([f"  not for IPUs: {why_not_ipu}"] if why_not_ipu else []),
        f"  a step: {samples:,} samples, {how}: {all_rows}",
        *([f"  {facts.missing}: {missing}"] if facts.missing else []),
        f"  measured: a micro-batch of {full_rows} {both}",
        f"  a step: {total}, {rounded(samples / step)} sequences/s",
        f"  {run}: about {duration(steps * step)}{epochs_of(steps * samples, facts)}",
        "  Not counted: reading data, checkpoints, evaluation. Rows that are not full are faster, where no padding is "
        "computed.",
    ]


def rounded(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
