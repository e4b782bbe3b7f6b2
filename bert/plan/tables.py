"""Tables: of a plan for IPUs the stages and the memory."""

from typing import List, Sequence

from bert.config import Config
from bert.plan.ipu_plan import IPU_BYTES, MIB, IpuPlan
from bert.plan.step import optimizer_name
from bert.text import percent

__all__ = ["gflop", "memory_lines", "stage_lines", "table"]


def stage_lines(plan: IpuPlan) -> List[str]:
    """The work of each stage and what it stashes."""
    rows = [["stage", "IPU", "blocks", "parameters", "forward", "recompute", "backward", "share", "stash"]]
    works = [stage.work for stage in plan.stages]
    for stage in plan.stages:
        first, last = stage.stage.blocks[0], stage.stage.blocks[-1]
        blocks = first if first == last else f"{first} to {last}"
        flops = [gflop(work) for work in (stage.forward, stage.recompute, stage.backward)]
        share, stash = percent(stage.work / sum(works), 1), f"{stage.stash / MIB:.2f} MiB x {stage.stashed}"
        rows.append([stage.stage.name, str(stage.stage.ipu), blocks, f"{stage.parameters:,}", *flops, share, stash])
    *others, last = (stage.stage.name for stage in plan.stages if stage.work == max(works))
    slowest = f"{', '.join(others)} and {last}" if others else last
    stash = "inputs and checkpoints that the backward pass begins from, of so many micro-batches under way"
    return [
        "Stages: what a micro-batch costs in matrix products, in GFLOP",
        *table(rows, left=("stage", "blocks")),
        f"  Slowest: {slowest}. Stash: {stash}.",
        "  The heads share the word embedding with the first stage, where it is counted.",
    ]


def memory_lines(config: Config, plan: IpuPlan) -> List[str]:
    """What fills each IPU."""
    moment = "fullest in the backward pass of"
    rows = [["IPU", *plan.memory[0].parts, "together", "full", moment]]
    for number, memory in enumerate(plan.memory):
        sizes = [f"{size / MIB:.1f}" for size in (*memory.parts.values(), memory.total)]
        rows.append([str(number), *sizes, percent(memory.total / IPU_BYTES), memory.operation])
    ipu, replicas = config.ipu, config.ipu.replication_factor // config.ipu.instances
    where = "whole on each replica"
    if ipu.optimizer_state_offchip:
        where = "in the host's memory"
    elif ipu.replicated_tensor_sharding and replicas > 1:
        where = f"1/{replicas} of them on each replica"
        if ipu.instances > 1:
            where += f" (poprun's {ipu.instances} processes have {replicas} each)"
    moments = f"{optimizer_name(config)}'s two moments, {where}"
    precision = "float32" if config.training.precision == "float32" else "float16"
    activations = "computed anew from a stash" if len(plan.stages) > 1 else "what the backward pass needs"
    return [
        f"Memory: each IPU when it is fullest, in MiB of {int(IPU_BYTES / MIB)}",
        *table(rows, left=(moment,)),
        f"  weights and gradients (added up over the step): {precision}. optimizer: {moments}.",
        f"  stashes: of its stages, from the table above. activations: {activations}, and gradients.",
        "  temporaries: of a matrix product, at most ipu.matmul_proportion of the IPU.",
        "  Program code and exchange buffers are not counted.",
    ]


def table(rows: Sequence[Sequence[str]], left: Sequence[str]) -> List[str]:
    """Aligned lines, the first of them names: the columns `left` to the left, the others to the right."""
    columns = []
    for name, *cells in zip(*rows):
        width = max(map(len, (name, *cells)))
        columns.append([f"{cell:{'<' if name in left else '>'}{width}}" for cell in (name, *cells)])
    return [f"  {'  '.join(cells)}".rstrip() for cells in zip(*columns)]


def gflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"
