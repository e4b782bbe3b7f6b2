"""The plan as it is printed: which device it is for, and its lines."""

import importlib.util
import os
import textwrap
from typing import List, Sequence, Tuple

from bert.config import Config, IpuConfig
from bert.plan.ipu_plan import IpuPlan, make_ipu_plan
from bert.plan.measured import measured_report, rows_and_samples
from bert.plan.parallel import parallel_lines
from bert.plan.speed import time_lines
from bert.plan.step import DataFacts, look_at_data, optimizer_name, run_name, step_lines
from bert.plan.tables import memory_lines, stage_lines
from bert.plan.warnings import warnings_of
from bert.text import count_of
from bert.validation import asks_for_ipu, validate_for_ipu
from data.errors import InputError

__all__ = ["ipu_report", "is_for_ipu", "print_plan"]

WIDTH = 120
GEOMETRY = ("micro_batch_size", "gradient_accumulation_steps", "replication_factor")  # of a step on IPUs


def print_plan(config: Config) -> None:
    """Prints the plan, and draws the one for IPUs into the current folder: a run's own folder is for the run.

    Raises InputError for a config, device or shards that cannot be used.
    """
    for_ipu, why_not = is_for_ipu(config)
    facts = look_at_data(config)
    if not for_ipu:
        if not int(os.environ.get("RANK", 0)):  # one of torchrun's processes is enough
            print_processes(config, facts, why_not)
        return
    plan, name = make_ipu_plan(config), run_name(config)
    path, ipus = f"plan-{name}.svg", len(plan.memory) * config.ipu.replication_factor
    print_lines([*ipu_report(config, plan, facts), ""])
    if importlib.util.find_spec("matplotlib") is None:
        print_lines(["matplotlib is not installed: no picture is drawn. For one: pip install matplotlib"])
    else:
        from bert.plan.picture import draw_plan  # here: matplotlib takes a while to import

        draw_plan(plan, f"{name} on {ipus} IPUs", optimizer_name(config), path)
        print_lines([f"Picture of the pipeline and the memory: {path}"])
    if config.device == "auto":
        print_lines(
            ["This is the plan for IPUs. To measure this machine: --plan --device cpu, or --plan --device cuda"]
        )


def print_processes(config: Config, facts: DataFacts, why_not_ipu: str) -> None:
    """The plan for CUDA or CPU. What several processes hold and send is printed even where the device is missing."""
    lines = parallel_lines(config, rows_and_samples(config, facts)[0])
    print_lines(lines)
    try:
        print_lines(measured_report(config, facts, why_not_ipu))
    except InputError as error:
        if not lines:
            raise
        print_lines([f"Not measured: {error}"])


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)), flush=True)


def is_for_ipu(config: Config) -> Tuple[bool, str]:
    """Whether the plan is for IPUs, and why not if the config leaves that open.

    Raises InputError for an ipu section that cannot run.
    """
    if config.device != "auto" or asks_for_ipu(config):
        return asks_for_ipu(config), ""
    ipu, default = config.ipu, IpuConfig()
    rows = ipu.micro_batch_size * ipu.gradient_accumulation_steps * ipu.replication_factor
    is_default = all(getattr(ipu, name) == getattr(default, name) for name in (*GEOMETRY, "layers_per_ipu"))
    fits = rows == config.training.global_batch_size and sum(ipu.layers_per_ipu) == config.model.num_hidden_layers
    if is_default and not fits:
        return False, f"the config says nothing of {', '.join('ipu.' + name for name in GEOMETRY)}"
    try:
        validate_for_ipu(config)
    except InputError as error:
        raise InputError(f"{error}. To plan for this machine instead: --device cpu, or --device cuda")
    return True, ""


def ipu_report(config: Config, plan: IpuPlan, facts: DataFacts) -> List[str]:
    """The plan for IPUs, in lines for people."""
    stages, replicas, ipus = len(plan.stages), config.ipu.replication_factor, len(config.ipu.layers_per_ipu)
    each = "each " if replicas > 1 else ""
    pipeline = f"a pipeline of {stages} stages" if stages > 1 else "a single stage"
    replica = f"{count_of(replicas, 'replica')}, {each}{pipeline} on {count_of(ipus, 'IPU')}"
    warnings = [f"  {line}" for line in warnings_of(config, plan)]
    return [
        f"Plan of {run_name(config)} for {count_of(ipus * replicas, 'IPU')}: {replica}",
        *("", *step_lines(config, facts)),
        *("", *stage_lines(plan)),
        *("", *memory_lines(config, plan)),
        *("", *time_lines(config, plan, facts)),
        *("", "Warnings" if warnings else "No warnings.", *warnings),
    ]
