"""Annotations of the graph for the IPU: under PopTorch real, elsewhere free.

The graph is written once. Inside `lowering(...)` every operation takes the form that PopTorch lowers, and the functions
below pass their annotations on to the module that is given: `poptorch` where the IPU engine compiles, a recorder with
the same few names where the planner (bert/plan/report.py) reads the graph, nothing where only the numerics of these
forms are wanted.
"""

import contextlib
from typing import Any, Mapping, NamedTuple, Optional

__all__ = [
    "MATMULS",
    "block",
    "is_lowering",
    "no_outline",
    "lowering",
    "matmul_memory",
    "mark_loss",
    "recompute_from",
    "serialized_matmul",
]

MATMULS = (
    "query_key_value",
    "attention_scores",
    "attention_context",
    "attention_output",
    "intermediate",
    "output",
    "select_tokens",
    "mlm_transform",
    "mlm_decoder",
)
"""Names of the graph's matrix products, for a memory proportion of their own."""


class _Lowering(NamedTuple):
    poptorch: Any
    loss_factor: float
    proportions: Mapping[str, float]


_lowering: Optional[_Lowering] = None


@contextlib.contextmanager
def lowering(poptorch=None, loss_factor: float = 1.0, proportions: Mapping[str, float] = {}):
    """While open, the operations of `ops/` take the forms that PopTorch lowers, annotated through the module
    `poptorch`, if any.

    The marked loss is multiplied by `loss_factor`. `proportions` maps names of `MATMULS` to the share of an IPU's
    memory that these products may take for temporaries.
    """
    global _lowering
    before, _lowering = _lowering, _Lowering(poptorch, loss_factor, proportions)
    try:
        yield
    finally:
        _lowering = before


def is_lowering() -> bool:
    """Whether the operations take the forms that PopTorch lowers."""
    return _lowering is not None


def _poptorch():
    return _lowering.poptorch if _lowering else None


def block(name: str, ipu: int):
    """A context around one block of the graph: `poptorch.Block(name, ipu_id=ipu)`."""
    poptorch = _poptorch()
    return poptorch.Block(name, ipu_id=ipu) if poptorch else contextlib.nullcontext()


def recompute_from(hidden):
    """Marks a tensor that the backward pass recomputes from, instead of storing what follows it
    (poptorch.recomputationCheckpoint)."""
    poptorch = _poptorch()
    return poptorch.recomputationCheckpoint(hidden) if poptorch else hidden


def no_outline(name: str):
    """A context whose operations are not outlined together with like ones elsewhere (poptorch.Attribute,
    `__outline`)."""
    poptorch = _poptorch()
    return poptorch.Attribute(__outline={"layer": name}) if poptorch else contextlib.nullcontext()


def matmul_memory(product, name: str):
    """Gives the matrix product `name` (one of MATMULS) its own memory proportion, where there is one
    (poptorch.set_available_memory)."""
    poptorch = _poptorch()
    if poptorch and name in _lowering.proportions:
        return poptorch.set_available_memory(product, _lowering.proportions[name])
    return product


def serialized_matmul(x, weight, factor: int):
    """x [T, I] times weight [O, I] transposed, O in `factor` parts that divide it (poptorch.serializedMatMul)."""
    poptorch = _poptorch()
    if poptorch and factor > 1:
        return poptorch.serializedMatMul(x, weight.t(), poptorch.MatMulSerializationMode.OutputChannels, factor)
    return x @ weight.t()


def mark_loss(loss):
    """The scalar that is differentiated, times `loss_factor` (poptorch.identity_loss)."""
    poptorch = _poptorch()
    if _lowering is not None and _lowering.loss_factor != 1:
        loss = loss * _lowering.loss_factor
    return poptorch.identity_loss(loss, reduction="none") if poptorch else loss
