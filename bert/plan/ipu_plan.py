"""What a config asks of IPUs: the work of each stage, the memory of each IPU, the cycles of a step. Figures, no text.

PopART pipelines S stages like this. The gradient of the last stage follows its forward pass at once, so a micro-batch
passes through 2 S - 1 parts, and in cycle c part p works on micro-batch c - p. The parts of one IPU take turns, and all
IPUs wait for the slowest. So stage s (from 0) stashes what it recomputes from for 2 (S - 1 - s) + 1 micro-batches, and
a step of N micro-batches takes N + 2 S - 2 cycles. Each stage is recomputed before its gradient, except the last, which
has just been computed.
"""

import copy
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from bert.config import Config, IpuConfig
from bert.model.stages import Stage
from bert.plan.trace import Operation, Trace, trace

__all__ = ["IPU_BYTES", "MIB", "IpuPlan", "Memory", "StagePlan", "make_ipu_plan", "with_settings"]

MIB = 2**20
TILES = 1472
IPU_BYTES = TILES * 624 * 1024  # of a Mk2 IPU
PEAK_FLOPS = {2: 250e12, 4: 62.5e12}  # of a Mk2 IPU, by the bytes of a number


@dataclass(frozen=True)
class Memory:
    """What memory holds at the fullest moment of a backward pass. Program code and exchange buffers are not counted."""

    parts: Dict[str, int]
    """Bytes of activations (recomputed ones, and gradients of all) and of a matrix product's temporaries. For a whole
    IPU also of weights, gradients (of the weights), optimizer (its state) and stashes (what micro-batches under way
    are recomputed from)."""
    operation: str
    """The operation whose gradient is computed at that moment, and its block."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StagePlan:
    """One stage. Work is in FLOPs of matrix products for one micro-batch."""

    stage: Stage
    parameters: int
    """Numbers in the parameters that it uses; the first of an IPU's stages that use a parameter counts it."""
    forward: int
    recompute: int
    backward: int
    stash: int
    """Bytes that it keeps of each micro-batch until its backward pass: its inputs and checkpoints."""
    stashed: int
    """Micro-batches that it keeps them of."""
    peak: Memory
    """Activations and temporaries."""

    @property
    def work(self) -> int:
        return self.forward + self.recompute + self.backward


@dataclass(frozen=True)
class IpuPlan:
    """A replica's stages and IPUs, and the cycles of a step."""

    stages: List[StagePlan]
    memory: List[Memory]
    """Of IPU 0, 1, ..."""
    cycles: int
    """In a step."""
    filling: int
    """Of these, the cycles that fill and drain the pipeline."""
    peak_flops: float
    """FLOP/s of a Mk2 IPU's matrix units; in float16 with float16 partial sums."""
    trace: Trace
    """What the plan was made from."""

    @property
    def fullest_share(self) -> float:
        """The share of its memory that the fullest IPU needs."""
        return fullest(self.memory).total / IPU_BYTES

    def work_of(self, ipu: int) -> int:
        """FLOPs of an IPU in a cycle."""
        return sum(stage.work for stage in self.stages if stage.stage.ipu == ipu)

    @property
    def slowest(self) -> int:
        """The IPU with the most work."""
        return max(range(len(self.memory)), key=self.work_of)

    @property
    def slowest_work(self) -> int:
        return self.work_of(self.slowest)


def make_ipu_plan(config: Config, traced: Optional[Trace] = None) -> IpuPlan:
    """The plan of a config that validate_for_ipu accepts. `traced` is its trace if there is one already: the number of
    replicas does not change it."""
    traced = traced or trace(config)
    stages = plan_stages(config, traced)
    number_bytes = 4 if config.training.precision == "float32" else 2
    memory = []
    for ipu in range(len(config.ipu.layers_per_ipu)):
        own = [stage for stage in stages if stage.stage.ipu == ipu]
        parameters, peak = sum(stage.parameters for stage in own), fullest(stage.peak for stage in own)
        parts = dict.fromkeys(("weights", "gradients"), parameters * number_bytes)
        parts["optimizer"] = optimizer_bytes(config, parameters)
        parts["stashes"] = sum(stage.stash * stage.stashed for stage in own)
        memory.append(Memory({**parts, **peak.parts}, peak.operation))
    filling = 2 * (len(stages) - 1)
    cycles = config.ipu.gradient_accumulation_steps + filling
    return IpuPlan(stages, memory, cycles, filling, PEAK_FLOPS[number_bytes], traced)


def optimizer_bytes(config: Config, parameters: int) -> int:
    """Bytes that LAMB and AdamW keep on one IPU: two moments of each parameter, of which the first may be float16. They
    are split over the replicas of one process."""
    ipu = config.ipu
    if ipu.optimizer_state_offchip:
        return 0
    half = ipu.enable_half_first_order_momentum and config.training.precision != "float32"
    replicas = ipu.replication_factor // ipu.instances if ipu.replicated_tensor_sharding else 1
    return -(-parameters * (6 if half else 8) // replicas)


def with_settings(config: Config, settings: Dict[str, Any]) -> Config:
    """A copy of `config` with other settings, which are named `section.key`."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        section, key = name.split(".")
        setattr(getattr(changed, section), key, value)
    return changed


def plan_stages(config: Config, traced: Trace) -> List[StagePlan]:
    stages: List[StagePlan] = []
    counted: Set[Tuple[int, int]] = set()  # (IPU, parameter)
    last = len(traced.stages) - 1
    for index, stage in enumerate(traced.stages):
        indices = traced.of_stage(stage)
        operations = [traced.operations[i] for i in indices]
        parts = recomputed_parts(traced, indices) if index < last else [indices]
        stashed = {i for part in parts for i in inputs_of(traced, part)}
        used = {i for operation in operations for i in operation.inputs}
        parameters = [i for i in used if traced.values[i].parameter and (stage.ipu, i) not in counted]
        counted.update((stage.ipu, i) for i in parameters)
        forward = sum(operation.flops for operation in operations)
        stages.append(
            StagePlan(
                stage,
                parameters=sum(traced.values[i].count for i in parameters),
                forward=forward,
                recompute=forward if index < last else 0,
                backward=sum(operation.flops * operation.gradients for operation in operations),
                stash=sum(traced.values[i].bytes for i in stashed),
                stashed=2 * (last - index) + 1,
                peak=fullest(peak_of(traced, part, stage, config.ipu) for part in parts),
            )
        )
    return stages


def recomputed_parts(traced: Trace, indices: Sequence[int]) -> List[List[int]]:
    """The operations of a stage, cut behind its checkpoints: each part is recomputed alone."""
    parts: List[List[int]] = [[]]
    for i in indices:
        parts[-1].append(i)
        if set(traced.operations[i].outputs) & set(traced.checkpoints):
            parts.append([])
    return [part for part in parts if part]


def inputs_of(traced: Trace, part: Sequence[int]) -> List[int]:
    """The values that a part uses and does not make: batch, checkpoints, the stage before; no parameters."""
    inside = set(part)
    used = sorted({i for k in part for i in traced.operations[k].inputs})
    return [i for i in used if traced.values[i].parameter is None and traced.values[i].made_by not in inside]


def peak_of(traced: Trace, part: Sequence[int], stage: Stage, ipu: IpuConfig) -> Memory:
    """The fullest moment of a part's backward pass.

    At the gradient of operation k these exist, about: what the gradients of k and of the operations before it need, the
    gradients of k's outputs and inputs, the gradients of the part's own inputs, which gather, and the temporaries of
    k's products.
    """
    values, inside = traced.values, set(part)
    saved = [(value.saved_by, value.bytes) for value in values if value.made_by in inside and value.saved_by in inside]
    own_inputs = {i for i in inputs_of(traced, part) if values[i].differentiable}
    moments = []
    for k in part:
        operation = traced.operations[k]
        activations = sum(size for saved_by, size in saved if saved_by <= k)
        activations += sum(values[i].bytes for i in operation.outputs if values[i].differentiable)
        for i in own_inputs | {i for i in operation.inputs if values[i].differentiable}:
            activations += values[i].bytes // (operation.parts if values[i].parameter else 1)
        proportion = ipu.operation_proportions.get(operation.name, stage.matmul_proportion)
        needed = temporaries(traced, operation, ipu.enable_half_partials)
        parts = {"activations": activations, "temporaries": min(needed, int(proportion * IPU_BYTES))}
        moments.append(Memory(parts, f"{operation.name} of {operation.block}"))
    return fullest(moments)


def fullest(memories: Iterable[Memory]) -> Memory:
    return max(memories, key=lambda memory: memory.total)


def temporaries(traced: Trace, operation: Operation, half_partials: bool) -> int:
    """Bytes that a matrix product takes for temporaries if its memory proportion sets no limit.

    The tiles share its work as a grid. Each takes its part of both operands and has its part of the result, so that all
    of them together have each operand and the partial results several times: at least 3 (A B C tiles)^(1/3) bytes, for
    operands of A and B bytes and a result of C.
    """
    batch, rows, inner, columns = operation.product
    if not batch:
        return 0
    number_bytes = traced.values[operation.outputs[0]].bytes // (batch * rows * columns)
    left, right = rows * inner * number_bytes, inner * columns * number_bytes // operation.parts
    result = rows * columns // operation.parts * (2 if half_partials and number_bytes == 2 else 4)
    spread = 3 * (left * right * result * max(1.0, TILES / batch)) ** (1 / 3)
    return int(batch * max(spread, left + right + result))
