"""How long a plan for IPUs takes: an estimate from one published speed."""

import os
from dataclasses import dataclass
from typing import List, Tuple

from bert.command_line import CONFIG_FOLDER, parse_command_line
from bert.config import Config
from bert.plan.ipu_plan import IpuPlan, make_ipu_plan, with_settings
from bert.plan.step import DataFacts, epochs_of, samples_of_step
from bert.plan.tables import gflop
from bert.text import duration, percent

__all__ = ["Speed", "calibrate", "other_pods", "speed_of", "time_lines"]

PUBLISHED_CONFIG, PUBLISHED_SPEED = "pod16_phase2", 2409  # sequences/s that Graphcore measured, with its own code
POD_IPUS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Speed:
    """How long a plan takes, in seconds."""

    efficiency: float
    """The share of its peak that the slowest IPU reaches."""
    cycle: float
    step: float


def calibrate() -> Tuple[Config, IpuPlan, Speed]:
    """The published run, its plan, and its speed, whose efficiency is what other plans are estimated with."""
    config = parse_command_line(["--config", os.path.join(CONFIG_FOLDER, "ipu", PUBLISHED_CONFIG + ".json")])
    plan = make_ipu_plan(config)
    cycle = config.training.global_batch_size / PUBLISHED_SPEED / plan.cycles
    return config, plan, speed_of(plan, plan.slowest_work / cycle / plan.peak_flops)


def speed_of(plan: IpuPlan, efficiency: float) -> Speed:
    """The speed of a plan whose slowest IPU reaches `efficiency` of its peak."""
    cycle = plan.slowest_work / (efficiency * plan.peak_flops)
    return Speed(efficiency, cycle, cycle * plan.cycles)


def time_lines(config: Config, plan: IpuPlan, facts: DataFacts) -> List[str]:
    """The estimate, and how it comes about."""
    published = calibrate()
    speed = speed_of(plan, published[2].efficiency)
    not_products = "lookups, softmax, LayerNorm, update, adding up gradients"
    return [
        *published_lines(*published),
        *cycle_lines(plan, speed),
        *run_lines(config, plan, facts, speed),
        f"  The efficiency has all that is no matrix product ({not_products}) as in that run.",
        "  Where a step has fewer micro-batches, updates come more often: larger pods will be slower than estimated.",
    ]


def published_lines(config: Config, plan: IpuPlan, speed: Speed) -> List[str]:
    source = f"the one published speed: {PUBLISHED_CONFIG}, {PUBLISHED_SPEED:,} sequences/s"
    step = f"{config.training.global_batch_size:,} / {PUBLISHED_SPEED:,} = {speed.step:.3f} s a step"
    cycle = f"/ {plan.cycles} cycles = {1e3 * speed.cycle:.2f} ms a cycle"
    work = f"{gflop(plan.slowest_work)} GFLOP (forward, recompute, backward)"
    return [
        f"Time: an estimate for Mk2 IPUs, from {source}",
        "  In a cycle each IPU works on one micro-batch for each of its stages, and waits for the slowest IPU.",
        f"  published: {step}, {cycle}, in which the slowest IPU does",
        f"    {work}: {percent(speed.efficiency, 1)} of its {plan.peak_flops / 1e12:.0f} TFLOP/s",
    ]


def cycle_lines(plan: IpuPlan, speed: Speed) -> List[str]:
    work = f"IPU {plan.slowest} is the slowest, {gflop(plan.slowest_work)} GFLOP"
    rate = f"{percent(speed.efficiency, 1)} of {plan.peak_flops / 1e12:g} TFLOP/s"
    cycle = f"{1e3 * speed.cycle:.2f} ms a cycle, x {plan.cycles:,} cycles"
    lines = [f"  here: {work} at {rate} = {cycle} = {speed.step:.2f} s a step"]
    if plan.filling:
        filling = percent(plan.filling / plan.cycles, 1)
        shares = [f"IPU {i} {percent(plan.work_of(i) / plan.slowest_work)}" for i in range(len(plan.memory))]
        lines.append(f"    {plan.filling} of the cycles fill and drain the pipeline: {filling} of a step")
        lines.append(f"    work of each IPU in a full cycle: {', '.join(shares)}")
    return lines


def run_lines(config: Config, plan: IpuPlan, facts: DataFacts, speed: Speed) -> List[str]:
    steps, samples = config.training.max_steps, samples_of_step(config, facts)
    run, epochs = f"The whole run, {steps:,} steps", ""
    unit, amount = "rows", config.training.global_batch_size
    if samples:
        run, epochs = f"{run}, {steps * samples:,} samples", epochs_of(steps * samples, facts)
        unit, amount = "sequences", samples
    lines = [f"  about {amount / speed.step:,.0f} {unit}/s. {run}: about {duration(steps * speed.step)}{epochs}"]
    pods = [
        f"POD{pod} {amount / seconds:,.0f}{'' if fits else ' (does not fit so)'}"
        for pod, seconds, fits in other_pods(config, plan, speed)
    ]
    return lines + ([f"  the same global batch on other pods, {unit}/s: {', '.join(pods)}"] if pods else [])


def other_pods(config: Config, plan: IpuPlan, speed: Speed) -> List[Tuple[int, float, bool]]:
    """(IPUs, seconds of a step, whether it fits) of the pods that can do the same global batch with the same
    micro-batches."""
    ipus, replicas = len(config.ipu.layers_per_ipu), config.ipu.replication_factor
    rows, micro_batch = config.training.global_batch_size, config.ipu.micro_batch_size
    pods = []
    for pod in POD_IPUS:
        accumulation, rest = divmod(rows * ipus, micro_batch * pod)
        can_do = pod % ipus == rest == 0 and accumulation > plan.filling
        if can_do and pod != ipus * replicas:
            settings = {"ipu.replication_factor": pod // ipus, "ipu.gradient_accumulation_steps": accumulation}
            other = make_ipu_plan(with_settings(config, settings), plan.trace)
            pods.append((pod, speed.cycle * other.cycles, other.fullest_share <= 1))
    return pods
