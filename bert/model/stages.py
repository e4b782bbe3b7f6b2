"""The stages of the pipeline, as data: which blocks of the graph run where, in which visit."""

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple, Union

from data.errors import InputError

__all__ = ["Stage", "make_stages", "pipeline_stages", "placement"]


@dataclass(frozen=True)
class Stage:
    """A part of the graph that runs on one IPU in one visit; in a pipeline of processes, `ipu` is the process.

    `blocks` name the parts of the graph, in order: `embeddings`, `layer0`, `layer1`, ..., `heads`.
    `matmul_proportion` is the share of the IPU's memory that a matrix product may take for temporaries.
    """

    name: str
    ipu: int
    matmul_proportion: float
    blocks: Tuple[str, ...]


def make_stages(layers_per_ipu: Sequence[int], matmul_proportion: Union[float, Sequence[float]]) -> List[Stage]:
    """Embeddings on IPU 0 (with its layers, if it has any), the other layers on the IPUs after it, heads on IPU 0
    again.

    The heads come back because the MLM decoder is the embedding's weight: [0, 4, 4, 4] gives five stages on four IPUs.
    """
    if not isinstance(matmul_proportion, Sequence):
        matmul_proportion = [matmul_proportion] * len(layers_per_ipu)
    stages, first = [], 0
    for ipu, count in enumerate(layers_per_ipu):
        layers = tuple(f"layer{i}" for i in range(first, first + count))
        first += count
        if ipu == 0:
            stages.append(Stage("embeddings", 0, matmul_proportion[0], ("embeddings",) + layers))
        elif layers:
            name = f"layers{first - count}-{first - 1}" if count > 1 else layers[0]
            stages.append(Stage(name, ipu, matmul_proportion[ipu], layers))
    if len(stages) == 1:  # one IPU: one stage, for a visit of its own would only keep activations waiting
        return [Stage("everything", 0, matmul_proportion[0], stages[0].blocks + ("heads",))]
    return stages + [Stage("heads", 0, matmul_proportion[0], ("heads",))]


def pipeline_stages(blocks: Sequence[str], processes: int, stages_per_process: int) -> List[Stage]:
    """The stages of a pipeline of processes on CUDA or CPU: stage s runs on process s % processes. What is before the
    first layer is in the first stage, what is after the last in the last.

    Each stage has the same number of layers. One more each of what is left goes to those just before the last stage,
    whose heads cost half a layer: earlier ones hold activations of more micro-batches.
    Raises InputError where a stage would have no layer.
    """
    layers = [index for index, block in enumerate(blocks) if block.startswith("layer")]
    count = processes * stages_per_process
    if count > len(layers):
        raise InputError(
            f"parallel.pipeline {processes} x parallel.stages_per_process {stages_per_process} is {count} stages, "
            f"expected at most {len(layers)}: one for each layer of the model. Make one of the two smaller"
        )
    each, left = divmod(len(layers), count)
    sizes = [each + (count - 1 - left <= stage < count - 1) for stage in range(count)]
    ends = [layers[0] + sum(sizes[: stage + 1]) for stage in range(count - 1)]
    parts = [tuple(blocks[first:end]) for first, end in zip([0, *ends], [*ends, len(blocks)])]
    return [Stage(f"stage{s}", s % processes, 1.0, part) for s, part in enumerate(parts)]


def placement(stages: Sequence[Stage]) -> Dict[str, int]:
    """Block name -> the IPU that it runs on."""
    return {block: stage.ipu for stage in stages for block in stage.blocks}
