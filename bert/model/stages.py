"""The stages of the pipeline, as data: which blocks of the graph run where, in which visit."""

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple, Union

__all__ = ["Stage", "make_stages", "placement"]


@dataclass(frozen=True)
class Stage:
    """A part of the graph that runs on one IPU in one visit.

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


def placement(stages: Sequence[Stage]) -> Dict[str, int]:
    """Block name -> the IPU that it runs on."""
    return {block: stage.ipu for stage in stages for block in stage.blocks}
