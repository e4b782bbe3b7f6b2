"""Annotations of the graph for the IPU: under PopTorch real, elsewhere free.

The graph is written once. Inside `lowering()`, which the IPU engine opens while PopTorch traces the graph, every operation takes
the form that PopTorch lowers, and `block` opens a real `poptorch.Block`. Without PopTorch `lowering()` takes the same forms, so
that their numerics can be checked on any machine.
"""

import contextlib
import sys

__all__ = ["block", "is_lowering", "lowering", "recompute_from"]

_lowering = False


@contextlib.contextmanager
def lowering():
    """While open, the operations of `ops/` take the forms that PopTorch lowers."""
    global _lowering
    before, _lowering = _lowering, True
    try:
        yield
    finally:
        _lowering = before


def is_lowering() -> bool:
    """Whether the graph is being traced for the IPU."""
    return _lowering


def _poptorch():
    """PopTorch, where the IPU engine has imported it and is tracing."""
    return sys.modules.get("poptorch") if _lowering else None


def block(name: str, ipu: int):
    """A context around one block of the graph: `poptorch.Block(name, ipu_id=ipu)` under PopTorch, nothing elsewhere."""
    poptorch = _poptorch()
    return poptorch.Block(name, ipu_id=ipu) if poptorch else contextlib.nullcontext()


def recompute_from(hidden):
    """Marks a tensor that the backward pass recomputes from, instead of storing what follows it (poptorch.recomputationCheckpoint)."""
    poptorch = _poptorch()
    return poptorch.recomputationCheckpoint(hidden) if poptorch else hidden
