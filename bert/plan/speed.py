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

__all__ = ["Speed", "calibrate", "other_pods", "time_lines"]

PUBLISHED_CONFIG, PUBLISHED_SPEED = "pod16_phase2", 2409  # sequences/s that Graphcore measured, with its own code
POD_IPUS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Speed:
    """How long a plan takes if the slowest IPU reaches `efficiency` of its peak."""

    plan: IpuPlan
    efficiency: float

    @property
    def cycle(self) -> float:
        """Seconds of a cycle."""
        return self.plan.slowest_work / (self.efficiency * self.plan.peak_flops)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.cycle * self.plan.cycles


def calibrate() -> Tuple[Config, Speed]:
    """The published run and its speed, whose efficiency is what other plans are estimated with."""
    config = parse_command_line(["--config", os.path.join(CONFIG_FOLDER, f"ipu/{PUBLISHED_CONFIG}.json")])
    plan = make_ipu_plan(config)
    cycle = config.training.global_batch_size / PUBLISHED_SPEED / plan.cycles
    return config, Speed(plan, plan.slowest_work / cycle / plan.peak_flops)


def time_lines(config: Config, plan: IpuPlan, facts: DataFacts) -> List[str]:
    """The estimate, and how it comes about."""
    published_config, published = calibrate()
    speed, efficiency = Speed(plan, published.efficiency), percent(published.efficiency, 1)
    step = f"{published_config.training.global_batch_size:,} / {PUBLISHED_SPEED:,} = {published.step:.3f} s a step"
    cycle = f"/ {published.plan.cycles} cycles = {1e3 * published.cycle:.2f} ms a cycle"
    work = f"{gflop(published.plan.slowest_work)} GFLOP (forward, recompute, backward)"
    return [
        f"Time: an estimate for Mk2 IPUs, from the one published speed: {PUBLISHED_CONFIG}, {PUBLISHED_SPEED:,} "
        "sequences/s",
        "  In a cycle each IPU works on one micro-batch for each of its stages, and waits for the slowest IPU.",
        f"  published: {step}, {cycle}, in which the slowest IPU does",
        f"    {work}: {efficiency} of its {published.plan.peak_flops / 1e12:.0f} TFLOP/s",
        *cycle_lines(speed),
        *run_lines(config, speed, facts),
        "  The efficiency has all that is no matrix product (lookups, softmax, LayerNorm, update, adding up gradients) "
        "as in that run.",
        "  Where a step has fewer micro-batches, updates come more often: larger pods will be slower than estimated.",
    ]


def cycle_lines(speed: Speed) -> List[str]:
    plan = speed.plan
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


def run_lines(config: Config, speed: Speed, facts: DataFacts) -> List[str]:
    steps, samples = config.training.max_steps, samples_of_step(config, facts)
    run, epochs = f"The whole run, {steps:,} steps", ""
    unit, amount = "rows", config.training.global_batch_size
    if samples:
        run, epochs = f"{run}, {steps * samples:,} samples", epochs_of(steps * samples, facts)
        unit, amount = "sequences", samples
    lines = [f"  about {amount / speed.step:,.0f} {unit}/s. {run}: about {duration(steps * speed.step)}{epochs}"]
    pods = []
    for pod, seconds, fits in other_pods(config, speed):
        pods.append(f"POD{pod} {amount / seconds:,.0f}{'' if fits else ' (does not fit so)'}")
    return lines + ([f"  the same global batch on other pods, {unit}/s: {', '.join(pods)}"] if pods else [])


def other_pods(config: Config, speed: Speed) -> List[Tuple[int, float, bool]]:
    """(IPUs, seconds of a step, whether it fits) of the pods that can do the same global batch with the same
    micro-batches."""
    ipus, replicas = len(config.ipu.layers_per_ipu), config.ipu.replication_factor
    of_a_process = replicas // config.ipu.instances
    rows, micro_batch = config.training.global_batch_size, config.ipu.micro_batch_size
    pods = []
    for pod in POD_IPUS:
        accumulation, rest = divmod(rows * ipus, micro_batch * pod)
        can_do = pod % ipus == rest == 0 and accumulation > speed.plan.filling
        if can_do and pod != ipus * replicas:
            settings = {"ipu.replication_factor": pod // ipus, "ipu.gradient_accumulation_steps": accumulation}
            settings["ipu.instances"] = max(1, pod // ipus // of_a_process)
            other = make_ipu_plan(with_settings(config, settings), speed.plan.trace)
            pods.append((pod, speed.cycle * other.cycles, other.fullest_share <= 1))
    return pods
