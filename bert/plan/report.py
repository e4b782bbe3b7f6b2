"""`--plan`: what would run where, how full each IPU gets, how long the run takes. Nothing is trained; a picture is
written.

For IPUs everything comes from the traced graph and one published speed; for CUDA and CPU a micro-batch is measured.
"""

import copy
import glob
import os
import sys
import textwrap
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from bert.config import CONFIG_FOLDER, Config, IpuConfig, parse_command_line, samples_per_row, validate_for_ipu
from bert.plan.ipu_plan import IPU_BYTES, IpuPlan, make_ipu_plan
from bert.plan.warnings import warnings_of
from bert.run.training import duration
from data.errors import InputError
from data.loading.shard_files import open_shards
from data.packing import pack
from data.rows import RowShape
from data.shards import read_samples

__all__ = ["Speed", "calibrate", "ipu_report", "measured_report", "picture_path", "plan", "speed_of"]

PUBLISHED = ("pod16_phase2", 2409)  # sequences/s that Graphcore measured with it, on its own implementation
POD_IPUS = (4, 8, 16, 32, 64)
SAMPLES_READ = 32768  # of the shards, to see how they pack
MIB, WIDTH = 2**20, 120


def plan(config: Config) -> None:
    """Prints the plan; for IPUs it draws it too, into the current folder.

    Raises InputError for a config, device or shards that cannot be used.
    """
    for_ipu, why_not = is_for_ipu(config)
    facts = look_at_data(config)
    if not for_ipu:
        say(measured_report(config, facts, why_not))
        return
    from bert.plan.picture import draw_plan  # here: matplotlib takes a while to import

    found = make_ipu_plan(config)
    say(ipu_report(config, found, facts) + [""])
    draw_plan(found, f"{name_of(config)} on {ipus_of(config)} IPUs", picture_path(config))
    say([f"Picture of the pipeline and the memory: {picture_path(config)}"])
    if config.device == "auto":
        say(["This is the plan for IPUs. To measure this machine: --plan --device cpu, or --plan --device cuda"])


def say(lines: Sequence[str]) -> None:
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        parts = textwrap.wrap(
            line.lstrip(), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
        )
        print("\n".join(parts) if len(line) > WIDTH else line)
    sys.stdout.flush()


def is_for_ipu(config: Config) -> Tuple[bool, str]:
    """Whether the plan is for IPUs, and why not where the config leaves it open. Raises InputError for an ipu section
    that cannot run."""
    if config.device != "auto" or config.compile_only or config.ipu_model:
        return config.device in ("auto", "ipu"), ""
    ipu, usual = config.ipu, IpuConfig()
    rows = ipu.micro_batch_size * ipu.gradient_accumulation_steps * ipu.replication_factor
    names = ("micro_batch_size", "gradient_accumulation_steps", "replication_factor")
    if rows != config.training.global_batch_size and all(getattr(ipu, name) == getattr(usual, name) for name in names):
        return False, f"the config says nothing of {', '.join('ipu.' + name for name in names)}"
    try:
        validate_for_ipu(config)
    except InputError as error:
        raise InputError(f"{error}. To plan for this machine instead: --device cpu, or --device cuda")
    return True, ""


def picture_path(config: Config) -> str:
    """plan-<name of the run>.svg, in the current folder: a run's own folder is for the run."""
    return f"plan-{name_of(config)}.svg"


def name_of(config: Config) -> str:
    return os.path.basename(os.path.normpath(config.training.output or "run"))


def ipus_of(config: Config) -> int:
    return len(config.ipu.layers_per_ipu) * config.ipu.replication_factor


@dataclass(frozen=True)
class DataFacts:
    """What the shards say, as far as they are there."""

    samples: Optional[int]
    filled: Optional[float]
    """Tokens of a sample, as a share of the sequence length, on average."""
    per_row: Optional[float]
    """Samples of a packed row, on average."""
    missing: str = ""


def look_at_data(config: Config) -> DataFacts:
    """Opens the shards where there are some. Raises InputError where they do not fit the config."""
    data = config.data
    if not any(glob.glob(pattern) for pattern in data.files):
        return DataFacts(
            None,
            None,
            None,
            (
                "no shards at "
                f"{', '.join(data.files) or 'data.files, which is empty'}{', training makes them from data.text' if data.text else ''}"
            ),
        )
    skipped = {} if data.on_bad_shard == "skip" else None
    shards = open_shards(data.files, data.sequence_length, data.mask_tokens, config.model.vocab_size, skipped)
    samples = sum(shard.num_samples for shard in shards)
    own = [shard for shard in shards if not shard.is_nvidia and shard.num_samples]
    if not own:  # NVIDIA's files do not say how long samples are before all of them is read
        return DataFacts(samples, None, None)
    first = read_samples(own[0].path, 0, min(SAMPLES_READ, own[0].num_samples))
    shape = RowShape.of(data.sequence_length, data.mask_tokens, data.samples_per_row)
    packing = pack(first.lengths, first.mlm_counts, *shape)
    return DataFacts(samples, float(first.lengths.mean()) / data.sequence_length, len(first) / packing.rows)


@dataclass(frozen=True)
class Speed:
    """How long a step of a plan takes, in seconds, at a share of the peak."""

    efficiency: float
    cycle: float
    step: float


def calibrate() -> Tuple[Config, IpuPlan, Speed]:
    """The published run: its config and plan, and the speed that it had, whose efficiency is what other plans are
    estimated with."""
    config = parse_command_line(["--config", os.path.join(CONFIG_FOLDER, PUBLISHED[0] + ".json")])
    found = make_ipu_plan(config)
    cycle = config.training.global_batch_size / PUBLISHED[1] / found.cycles
    return config, found, speed_of(found, found.work_of(found.slowest) / cycle / found.peak)


def speed_of(found: IpuPlan, efficiency: float) -> Speed:
    """The speed of a plan whose slowest IPU gets `efficiency` of its peak."""
    cycle = found.work_of(found.slowest) / (efficiency * found.peak)
    return Speed(efficiency, cycle, cycle * found.cycles)


def ipu_report(config: Config, found: IpuPlan, facts: DataFacts) -> List[str]:
    """The plan for IPUs, in lines for people."""
    ipu, count = config.ipu, len(found.stages)
    lines = [
        "Plan of %s for %s: %s, %s%s on %s"
        % (
            name_of(config),
            number_of(ipus_of(config), "IPU"),
            number_of(ipu.replication_factor, "replica"),
            "each " if ipu.replication_factor > 1 else "",
            "a pipeline of %d stages" % count if count > 1 else "a single stage",
            number_of(len(ipu.layers_per_ipu), "IPU"),
        ),
        "",
    ]
    lines += step_lines(config, facts) + [""] + stage_lines(found) + [""] + memory_lines(config, found) + [""]
    lines += time_lines(config, found, facts) + [""]
    warnings = warnings_of(config, found)
    return lines + (["Warnings"] + ["  " + line for line in warnings] if warnings else ["No warnings."])


def step_lines(config: Config, facts: DataFacts) -> List[str]:
    data, ipu, rows = config.data, config.ipu, config.training.global_batch_size
    samples = samples_of_a_step(config, facts)
    lines = [
        "A step",
        (
            f"  {thousands(ipu.gradient_accumulation_steps)} micro-batches of {ipu.micro_batch_size} rows on each "
            f"replica: {thousands(rows)} rows of {data.sequence_length} tokens, "
            f"{thousands(rows * data.sequence_length)} token slots"
        ),
    ]
    if samples_per_row(config, "ipu") == 1:
        lines.append(f'  {thousands(samples)} samples, one a row (data.packing is "{data.packing}")')
    elif samples:
        lines.append(
            f"  about {thousands(samples)} samples, {facts.per_row:.2f} a row, as the first of data.files "
            f"pack; up to {data.samples_per_row} share a row"
        )
    else:
        lines.append(f"  up to {data.samples_per_row} samples share a row; how many do depends on their lengths")
    if facts.filled:
        tokens = samples * facts.filled * data.sequence_length
        lines.append(
            f"  about {thousands(tokens)} tokens, which fill {100 * tokens / rows / data.sequence_length:.0f} "
            "% of the slots"
        )
    if facts.missing:
        lines.append(
            f"  {facts.missing}: with shards there, the plan says how many "
            f"tokens{' and samples' if samples is None else ''} a step has, and how many epochs the run is"
        )
    return lines


def samples_of_a_step(config: Config, facts: DataFacts) -> Optional[int]:
    """None where samples share rows and nothing says how many do."""
    rows = config.training.global_batch_size
    if samples_per_row(config, "ipu") == 1:
        return rows
    return int(rows * facts.per_row) if facts.per_row else None


def stage_lines(found: IpuPlan) -> List[str]:
    works = sum(stage.work for stage in found.stages)
    rows = [("stage", "IPU", "blocks", "parameters", "forward", "recompute", "backward", "share", "stash")]
    for one in found.stages:
        blocks = one.stage.blocks
        rows.append(
            (
                one.stage.name,
                one.stage.ipu,
                blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}",
                thousands(one.parameters),
                gflop(one.forward),
                gflop(one.recompute),
                gflop(one.backward),
                f"{100 * one.work / works:.1f} %",
                f"{one.kept / MIB:.2f} MiB x {one.micro_batches_kept}",
            )
        )
    most = max(one.work for one in found.stages)
    slowest = [one.stage.name for one in found.stages if one.work == most]
    return (
        ["Stages: what a micro-batch costs in matrix products, in GFLOP"]
        + table(rows, left=(0, 2))
        + [
            (
                f"  Slowest: {' and '.join(filter(None, (', '.join(slowest[:-1]), slowest[-1])))}. Stash: inputs "
                "and checkpoints that the backward pass begins from, of so many micro-batches under way."
            ),
            "  The heads share the word embedding with the first stage, where it is counted.",
        ]
    )


def memory_lines(config: Config, found: IpuPlan) -> List[str]:
    rows = [
        (
            "IPU",
            "weights",
            "gradients",
            "optimizer",
            "stashes",
            "activations",
            "temporaries",
            "together",
            "full",
            "fullest in the backward pass of",
        )
    ]
    for number, one in enumerate(found.memory):
        parts = (one.weights, one.gradients, one.optimizer, one.stashes, one.activations, one.temporaries, one.total)
        rows.append(
            (number,)
            + tuple(f"{part / MIB:.1f}" for part in parts)
            + (f"{100 * one.total / IPU_BYTES:.0f} %", one.moment)
        )
    ipu = config.ipu
    if ipu.optimizer_state_offchip:
        state = "in the host's memory"
    elif ipu.replicated_tensor_sharding and ipu.replication_factor > 1:
        state = f"1/{ipu.replication_factor} of them on each replica"
    else:
        state = "whole on each replica"
    return (
        [f"Memory: each IPU when it is fullest, in MiB of {int(IPU_BYTES / MIB)}"]
        + table(rows, left=(9,))
        + [
            (
                "  weights and gradients (added up over the step): "
                f"{'float32' if config.training.precision == 'float32' else 'float16'}. optimizer: LAMB's two "
                f"moments, {state}."
            ),
            (
                "  stashes: of its stages, from the table above. activations: "
                f"{'computed anew from a stash' if len(found.stages) > 1 else 'what the backward pass needs'}, "
                "and gradients."
            ),
            "  temporaries: of a matrix product, at most ipu.matmul_proportion of the IPU.",
            "  Program code and exchange buffers are not counted.",
        ]
    )


def time_lines(config: Config, found: IpuPlan, facts: DataFacts) -> List[str]:
    training, slowest = config.training, found.slowest
    base, base_plan, base_speed = calibrate()
    speed = speed_of(found, base_speed.efficiency)
    samples = samples_of_a_step(config, facts)
    unit, amount = ("sequences", samples) if samples else ("rows", training.global_batch_size)
    lines = [
        (
            f"Time: an estimate for Mk2 IPUs, from the one published speed: {PUBLISHED[0]}, "
            f"{thousands(PUBLISHED[1])} sequences/s"
        ),
        "  In a cycle each IPU works on one micro-batch for each of its stages, and waits for the slowest IPU.",
        (
            f"  published: {thousands(base.training.global_batch_size)} / {thousands(PUBLISHED[1])} = "
            f"{base_speed.step:.3f} s a step, / {base_plan.cycles} cycles = {1e3 * base_speed.cycle:.2f} ms a "
            "cycle, in which the slowest IPU does"
        ),
        (
            f"    {gflop(base_plan.work_of(base_plan.slowest))} GFLOP (forward, recompute, backward): "
            f"{100 * base_speed.efficiency:.1f} % of its {base_plan.peak / 1e12:.0f} TFLOP/s"
        ),
        (
            f"  here: IPU {slowest} is the slowest, {gflop(found.work_of(slowest))} GFLOP at "
            f"{100 * speed.efficiency:.1f} % of {found.peak / 1e12:g} TFLOP/s = {1e3 * speed.cycle:.2f} ms a "
            f"cycle, x {thousands(found.cycles)} cycles = {speed.step:.2f} s a step"
        ),
    ]
    if found.filling:
        lines += [
            (
                f"    {found.filling} of the cycles fill and drain the pipeline: "
                f"{100 * found.filling / found.cycles:.1f} % of a step"
            ),
            "    work of each IPU in a full cycle: %s"
            % ", ".join(
                "IPU %d %.0f %%" % (i, 100 * found.work_of(i) / found.work_of(slowest))
                for i in range(len(found.memory))
            ),
        ]
    lines.append(
        "  about %s %s/s. The whole run, %s steps%s: about %s%s"
        % (
            thousands(amount / speed.step),
            unit,
            thousands(training.max_steps),
            ", %s samples" % thousands(training.max_steps * samples) if samples else "",
            duration(training.max_steps * speed.step),
            epochs_of(training.max_steps * samples, facts) if samples else "",
        )
    )
    others = other_pods(config, found, speed)
    if others:
        lines.append(
            "  the same global batch on other pods, %s/s: %s"
            % (
                unit,
                ", ".join(
                    "POD%d %s%s" % (pod, thousands(amount / seconds), "" if fits else " (does not fit so)")
                    for pod, seconds, fits in others
                ),
            )
        )
    return lines + [
        (
            "  The efficiency has all that is no matrix product (lookups, softmax, LayerNorm, update, adding up "
            "gradients) as in that run."
        ),
        "  Where a step has fewer micro-batches, updates come more often: larger pods will be slower than estimated.",
    ]


def epochs_of(samples: int, facts: DataFacts) -> str:
    return f", {samples / facts.samples:,.2f} epochs" if facts.samples else ""


def other_pods(config: Config, found: IpuPlan, speed: Speed) -> List[Tuple[int, float, bool]]:
    """(IPUs, seconds of a step, whether it fits) of the pods that the global batch can be cut for in the same
    micro-batches."""
    ipus, rows, own = len(config.ipu.layers_per_ipu), config.training.global_batch_size, ipus_of(config)
    others = []
    for pod in POD_IPUS:
        accumulation, rest = divmod(rows * ipus, config.ipu.micro_batch_size * pod)
        if pod != own and pod % ipus == 0 and rest == 0 and accumulation > found.filling:
            there = copy.deepcopy(config)
            there.ipu.replication_factor, there.ipu.gradient_accumulation_steps = pod // ipus, accumulation
            other = make_ipu_plan(there, found.trace)
            others.append((pod, speed.cycle * other.cycles, other.fullest <= 1))
    return others


def measured_report(config: Config, facts: DataFacts, why_not_ipu: str) -> List[str]:
    """The plan for CUDA or CPU, which is measured on this machine, in lines for people."""
    from bert.plan.measure import measure  # here: the plan for IPUs needs no engine

    training, length, packing = config.training, config.data.sequence_length, config.data.packing
    per_row = (facts.per_row or 1.0) if packing != "off" else 1.0
    rows = (
        training.global_batch_size
        if packing in ("off", "rows")
        else max(1, round(training.global_batch_size / per_row))
    )
    samples = training.global_batch_size if packing != "rows" else int(rows * per_row)
    found = measure(config, rows)
    count = -(-rows // found.rows)
    step = count * found.micro_batch + found.update
    how = "one a row" if facts.per_row or packing == "off" else "taken as one a row"
    if per_row > 1:
        how = f"{per_row:.2f} a row, as the first of data.files pack"
    lines = [f"Plan of {name_of(config)} on this machine: {found.machine}"]
    lines += [f"  not for IPUs: {why_not_ipu}"] if why_not_ipu else []
    lines += [
        (
            f"  a step: {thousands(samples)} samples, {how}: {thousands(rows)} rows of {length} tokens, "
            f"{number_of(count, 'micro-batch', 'micro-batches')}"
        )
    ]
    if facts.missing:
        lines.append(
            f"  {facts.missing}: with shards there, the plan says how they share rows, and how many epochs the run is"
        )
    return lines + [
        (
            f"  measured: a micro-batch of {number_of(found.rows, 'full row')} of {length} tokens "
            f"{found.micro_batch:.3f} s forward and backward, LAMB's update {found.update:.3f} s"
        ),
        (
            f"  a step: {thousands(count)} x {found.micro_batch:.3f} s + {found.update:.3f} s = {rounded(step)} "
            f"s, {rounded(samples / step)} sequences/s"
        ),
        (
            f"  the whole run, {thousands(training.max_steps)} steps, {thousands(training.max_steps * samples)} "
            f"samples: about {duration(training.max_steps * step)}{epochs_of(training.max_steps * samples, facts)}"
        ),
        (
            "  Not counted: reading data, checkpoints, evaluation. Rows that are not full are faster, where no "
            "padding is computed."
        ),
    ]


def table(rows: Sequence[Sequence], left: Sequence[int] = ()) -> List[str]:
    """Aligned lines: columns of `left` to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            str(cell).ljust(width) if i in left else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def number_of(count: int, what: str, many: str = "") -> str:
    return f"{thousands(count)} {what if count == 1 else many or what + 's'}"


def thousands(number: float) -> str:
    return f"{number:,.0f}"


def rounded(number: float) -> str:
    return f"{number:.3g}" if number < 100 else thousands(number)


def gflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"
