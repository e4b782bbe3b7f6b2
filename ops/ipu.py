"""Annotations of the model for the IPU: under PopTorch real, elsewhere free.

The model is written once. Inside `lowering(...)` every operation takes the form that PopTorch lowers, and the functions
below pass their annotations on to the module that is given: `poptorch` where the IPU engine compiles, a tracer with the
same few names where the planner (bert/plan/trace.py) reads the model, nothing where only the numerics of these forms
are wanted.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, List, Mapping, Optional

__all__ = [
    "MATMULS",
    "block",
    "is_lowering",
    "lowering",
    "mark_loss",
    "matmul_memory",
    "no_outline",
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
"""Names of the model's matrix products, for a memory proportion of their own."""


@dataclass
class lowering:
    """While open, the operations of `ops/` take the forms that PopTorch lowers, annotated through `poptorch`."""

    poptorch: Any = None
    """The module, or a stand-in; None: no annotations."""
    placement: Mapping[str, int] = field(default_factory=dict)
    """The name of each block -> its IPU."""
    recompute: bool = True
    """Whether `recompute_from` marks anything."""
    loss_factor: float = 1.0
    """What the marked loss is multiplied by."""
    proportions: Mapping[str, float] = field(default_factory=dict)
    """Names of `MATMULS` -> the share of an IPU's memory that these products may take for temporaries."""

    def __enter__(self) -> None:
        _open.append(self)

    def __exit__(self, *error: object) -> None:
        _open.pop()


_open: List[lowering] = []
_NOT_LOWERING = lowering()


def _now() -> lowering:
    return _open[-1] if _open else _NOT_LOWERING


def is_lowering() -> bool:
    """Whether the operations take the forms that PopTorch lowers."""
    return bool(_open)


def block(name: str):
    """A context around one block of the model: `poptorch.Block(name, ipu_id=...)`, on the IPU that `placement` says.

    Raises ValueError for a block that has no place.
    """
    now = _now()
    if not now.poptorch:
        return contextlib.nullcontext()
    if name not in now.placement:
        raise ValueError(f"block {name} is in no stage; the stages have {', '.join(now.placement) or 'no blocks'}")
    return now.poptorch.Block(name, ipu_id=now.placement[name])


def recompute_from(hidden):
    """Marks a tensor that the backward pass recomputes from, instead of storing what follows it
    (poptorch.recomputationCheckpoint)."""
    now = _now()
    return now.poptorch.recomputationCheckpoint(hidden) if now.poptorch and now.recompute else hidden


def no_outline(name: str):
    """A context whose operations are not outlined together with like ones elsewhere (poptorch.Attribute,
    `__outline`)."""
    poptorch = _now().poptorch
    return poptorch.Attribute(__outline={"layer": name}) if poptorch else contextlib.nullcontext()


def matmul_memory(product, name: Optional[str]):
    """Gives the matrix product `name` its own memory proportion, where there is one (poptorch.set_available_memory).

    `name` is one of MATMULS, or None for a product that has no name; anything else raises ValueError.
    """
    if not name:
        return product
    if name not in MATMULS:
        raise ValueError(f"a matrix product is named {name!r}, expected None or one of {', '.join(MATMULS)}")
    now = _now()
    if now.poptorch and name in now.proportions:
        return now.poptorch.set_available_memory(product, now.proportions[name])
    return product


def serialized_matmul(x, weight, factor: int):
    """x [T, I] times weight [O, I] transposed, O in `factor` parts that divide it (poptorch.serializedMatMul)."""
    poptorch = _now().poptorch
    if poptorch and factor > 1:
        return poptorch.serializedMatMul(x, weight.t(), poptorch.MatMulSerializationMode.OutputChannels, factor)
    return x @ weight.t()


def mark_loss(loss):
    """The scalar that is differentiated, times `loss_factor` (poptorch.identity_loss)."""
    now = _now()
    if now.loss_factor != 1:
        loss = loss * now.loss_factor
    return now.poptorch.identity_loss(loss, reduction="none") if now.poptorch else loss
