"""Dropout: PyTorch's, and on the CPU one that draws its mask on all cores and stores none.

Shape letters: T tokens (any leading dimensions), H hidden.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.native import call, draw_seed, is_native

__all__ = ["dropout"]


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Each element of x [T, H] is 0 with probability `p`, else divided by 1 - p."""
    if not p:
        return x
    return _Dropout.apply(x, float(p), draw_seed()) if is_native(x) else F.dropout(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return _apply(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _apply(gradient, ctx.p, ctx.seed), None, None


def _apply(x, p, seed):
    x = x.contiguous()
    y = torch.empty_like(x)
    call("dropout_apply", x, y, x.numel() // x.shape[-1], x.shape[-1], p, seed)
    return y
