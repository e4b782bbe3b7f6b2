"""LayerNorm whose parameters' gradients are sums in float32, whatever type the activations have.

Shape letters: T tokens (any leading dimensions), H hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LayerNorm", "layer_norm"]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H], weight and bias [H] -> [T, H]."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    # PyTorch's kernel for CPUs adds a bfloat16 sum token by token: after some hundred it stands still.
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """`layer_norm` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
