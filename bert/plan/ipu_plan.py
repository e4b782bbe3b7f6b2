"""What a config asks of IPUs: the work of each stage, the memory of each IPU, the cycles of a step. Figures, no text.

PopART pipelines S stages so: the gradient of the last stage follows it at once, so there are 2 S - 1 parts, and part p
works on micro-batch c - p in cycle c. The parts of one IPU take turns, and all IPUs wait for the slowest. So stage s
(from 0) keeps what it recomputes from for 2 (S - 1 - s) + 1 micro-batches, and a step of N micro-batches takes N + 2 S
- 2 cycles. Stages are recomputed before their gradient, but for the last, which has just been computed.
"""

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from bert.config import Config
from bert.model.stages import Stage
from bert.plan.trace import Operation, Trace, trace

__all__ = ["IPU_BYTES", "IpuMemory", "IpuPlan", "StagePlan", "make_ipu_plan"]

TILES = 1472
IPU_BYTES = TILES * 624 * 1024  # of a Mk2 IPU
PEAK_FLOPS = {2: 250e12, 4: 62.5e12}  # of a Mk2 IPU, by the bytes of a number


@dataclass(frozen=True)
class StagePlan:
    """One stage. Work is in FLOPs of matrix products for one micro-batch."""

    stage: Stage
    parameters: int
    """That it uses; a parameter that is used by several stages of an IPU counts in the first of them."""
    forward: int
    recompute: int
    backward: int
    kept: int
    """Bytes that it keeps of each micro-batch until its backward pass: its inputs and checkpoints."""
    micro_batches_kept: int

    @property
    def work(self) -> int:
        return self.forward + self.recompute + self.backward


@dataclass(frozen=True)
class IpuMemory:
    """What fills one IPU, in bytes, at its fullest moment: program code and exchange buffers come on top."""

    weights: int
    gradients: int
    """Accumulated over the step's micro-batches."""
    optimizer: int
    stashes: int
    """Inputs and checkpoints of the micro-batches under way."""
    activations: int
    """Recomputed from a checkpoint, and gradients, when they and the product's temporaries need most."""
    temporaries: int
    """Temporaries of the matrix product at that moment."""
    moment: str
    """That moment: the operation whose gradient is computed, and its block."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.stashes + self.activations + self.temporaries


@dataclass(frozen=True)
class IpuPlan:
    """A replica's stages and IPUs, and the cycles of a step."""

    stages: List[StagePlan]
    memory: List[IpuMemory]
    """Of IPU 0, 1, ..."""
    cycles: int
    """In a step."""
    filling: int
    """Of these, the cycles that fill and drain the pipeline."""
    peak: float
    """FLOP/s of a Mk2 IPU's matrix units; in float16 with float16 partial sums."""
    trace: Trace
    """What it was made from."""

    @property
    def fullest(self) -> float:
        """The share of its memory that the fullest IPU needs."""
        return max(one.total for one in self.memory) / IPU_BYTES

    def work_of(self, ipu: int) -> int:
        """FLOPs of an IPU in a cycle."""
        return sum(stage.work for stage in self.stages if stage.stage.ipu == ipu)

    @property
    def slowest(self) -> int:
        """The IPU with the most work."""
        return max(range(len(self.memory)), key=self.work_of)


def make_ipu_plan(config: Config, traced: Optional[Trace] = None) -> IpuPlan:
    """The plan of a config that validate_for_ipu accepts; `traced` is its trace, where there is one: replicas do not
    change it."""
    found = traced or trace(config)
    ipu, last = config.ipu, len(found.stages) - 1
    number_bytes = 4 if config.training.precision == "float32" else 2
    stages, peaks, seen = [], [], set()
    for index, stage in enumerate(found.stages):
        operations = [found.operations[i] for i in found.of_stage(stage)]
        forward = sum(one.flops for one in operations)
        parts = segments(found, stage, whole=index == last)
        kept = {i for part in parts for i in inputs_of(found, part)}
        new = [i for i in found.parameters_of(stage) if (stage.ipu, i) not in seen]
        seen.update((stage.ipu, i) for i in new)
        stages.append(
            StagePlan(
                stage,
                sum(found.values[i].count for i in new),
                forward,
                forward if index < last else 0,
                sum(one.flops * one.gradients for one in operations),
                sum(found.values[i].bytes for i in kept),
                2 * (last - index) + 1,
            )
        )
        peaks.append(
            max(
                (
                    peak_of(found, part, stage.matmul_proportion, ipu.operation_proportions, ipu.enable_half_partials)
                    for part in parts
                ),
                key=lambda one: one[0] + one[1],
            )
        )
    memory = []
    for number in range(len(ipu.layers_per_ipu)):
        here = [i for i, one in enumerate(stages) if one.stage.ipu == number]
        parameters = sum(stages[i].parameters for i in here)
        activations, taken, moment = max((peaks[i] for i in here), key=lambda one: one[0] + one[1])
        memory.append(
            IpuMemory(
                parameters * number_bytes,
                parameters * number_bytes,
                optimizer_bytes(parameters, config),
                sum(stages[i].kept * stages[i].micro_batches_kept for i in here),
                activations,
                taken,
                moment,
            )
        )
    return IpuPlan(
        stages, memory, ipu.gradient_accumulation_steps + 2 * last, 2 * last, PEAK_FLOPS[number_bytes], found
    )


def optimizer_bytes(parameters: int, config: Config) -> int:
    """LAMB's two moments on one IPU."""
    ipu = config.ipu
    if ipu.optimizer_state_offchip:
        return 0
    half = ipu.enable_half_first_order_momentum and config.training.precision != "float32"
    each = (2 if half else 4) + 4
    return -(-parameters * each // (ipu.replication_factor if ipu.replicated_tensor_sharding else 1))


def segments(found: Trace, stage: Stage, whole: bool) -> List[List[int]]:
    """The operations of a stage, cut behind its checkpoints: each part is recomputed alone. `whole`: there is nothing
    to recompute."""
    parts = [[]]
    for i in found.of_stage(stage):
        parts[-1].append(i)
        if not whole and set(found.operations[i].outputs) & set(found.checkpoints):
            parts.append([])
    return [part for part in parts if part]


def inputs_of(found: Trace, part: Sequence[int]) -> List[int]:
    """The values that operations use and others made: batch, checkpoints, the stage before; no parameters."""
    inside = set(part)
    used = sorted({i for k in part for i in found.operations[k].inputs})
    return [i for i in used if found.values[i].parameter is None and found.values[i].made_by not in inside]


def peak_of(
    found: Trace, part: Sequence[int], proportion: float, proportions: Dict[str, float], half_partials: bool
) -> Tuple[int, int, str]:
    """(bytes of activations and gradients, of a product's temporaries, the operation) at the fullest moment of a part's
    backward pass.

    At the gradient of operation k there are, about: what the gradients of k and of the operations before it need, the
    gradients of k's outputs and inputs, those of the part's own inputs, which gather, and the temporaries of k's
    products.
    """
    values, inside = found.values, set(part)
    saved = [value for value in values if value.made_by in inside and value.saved_by in inside]
    own = {i for i in inputs_of(found, part) if values[i].differentiable}
    moments = []
    for k in part:
        one = found.operations[k]
        held = sum(value.bytes for value in saved if value.saved_by <= k)
        held += sum(values[i].bytes for i in one.outputs if values[i].differentiable)
        for i in own | {i for i in one.inputs if values[i].differentiable}:
            held += values[i].bytes // (one.parts if values[i].parameter else 1)
        share = proportions.get(one.name, proportion)
        moments.append(
            (held, min(temporaries(found, one, half_partials), int(share * IPU_BYTES)), f"{one.name} of {one.block}")
        )
    return max(moments, key=lambda moment: moment[0] + moment[1])


def temporaries(found: Trace, one: Operation, half_partials: bool) -> int:
    """Bytes that a matrix product takes for temporaries where its memory proportion does not bind.

    Tiles share its work as a grid. Each takes its part of both operands and has its part of the result, so that all of
    them together have each operand and the partial results several times: at least 3 (A B C tiles)^(1/3) bytes, for
    operands of A and B bytes and a result of C.
    """
    batch, rows, inner, columns = one.product
    if not batch:
        return 0
    number_bytes = found.values[one.outputs[0]].bytes // (batch * rows * columns)
    left, right = rows * inner * number_bytes, inner * columns * number_bytes // one.parts
    result = rows * columns // one.parts * (2 if half_partials and number_bytes == 2 else 4)
    spread = 3 * (left * right * result * max(1.0, TILES / batch)) ** (1 / 3)
    return int(batch * max(spread, left + right + result))
