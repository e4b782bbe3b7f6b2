"""LayerNorm whose parameters' gradients are sums in float32, whatever type the activations have.

Shape letters: T tokens (any leading dimensions), H hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["LayerNorm", "layer_norm"]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H], weight and bias [H] -> [T, H]."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _SummedInFloat32.apply(x, weight, bias, eps)


class _SummedInFloat32(torch.autograd.Function):
    # PyTorch's kernel for CPUs adds up a bfloat16 sum token by token: after some hundred it stands still.
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        normal, *statistics = torch.native_layer_norm(x, weight.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        inputs = gradient.float(), x.float(), weight.shape, mean, rstd, weight.float(), bias.float()
        gradients = torch.ops.aten.native_layer_norm_backward(*inputs, [True] * 3)
        return (*(part.to(x.dtype) for part in gradients), None)


class LayerNorm(nn.LayerNorm):
    """`layer_norm` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
