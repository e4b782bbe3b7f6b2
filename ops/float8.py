"""Linear layers whose three products are float8: activations and weights e4m3, gradients e5m2, one scale a tensor
(arXiv 2209.05433).

A scale is taken from the tensor it is for, on the device: the host waits for nothing and no history is kept. Weights,
biases and their gradients have the types that they have elsewhere.

Shape letters: T tokens (any leading dimensions), I input features, O output features.
"""

import contextlib
from typing import Tuple

import torch
import torch.nn.functional as F

__all__ = ["float8", "float8_linear", "float8_linear_plain", "is_float8"]

MULTIPLE = 16  # what each dimension of a float8 product must be a multiple of

_float8 = False


@contextlib.contextmanager
def float8():
    """While open, the linear layers of ops/linear.py are float8."""
    global _float8
    before, _float8 = _float8, True
    try:
        yield
    finally:
        _float8 = before


def is_float8() -> bool:
    """Whether linear layers are float8."""
    return _float8


def float8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [T, I], weight [O, I], bias [O] -> [T, O] in x's type, rounded to bfloat16.

    Raises ValueError where T, I or O is no multiple of 16.
    """
    sizes = {"tokens": x.shape[:-1].numel(), "input features": weight.shape[1], "output features": weight.shape[0]}
    for name, size in sizes.items():
        if size % MULTIPLE or not size:
            shapes = f"input {tuple(x.shape)}, weight {tuple(weight.shape)}"
            raise ValueError(f"a float8 linear layer has {size} {name} ({shapes}), expected a multiple of {MULTIPLE}")
    return _Float8Linear.apply(x.flatten(0, -2), weight, bias).view(x.shape[:-1] + weight.shape[:1])


def float8_linear_plain(x, weight, bias) -> torch.Tensor:
    """The same in float32 products of float8 values, with autograd: the fast form is tested against it."""
    product = F.linear(_round(x), _round(weight))
    if product.requires_grad:
        product.register_hook(lambda gradient: _dequantize(*_quantize(gradient, torch.float8_e5m2)))
    return (product + bias).to(x.dtype)


def _quantize(tensor: torch.Tensor, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """`tensor` in float8, row-major, and the scale, a float32 scalar, that gives it back. Anything not finite makes all
    of it NaN."""
    largest = torch.finfo(dtype).max
    scale = tensor.abs().amax().float().clamp(min=1e-30) / largest  # above 0 for a tensor of zeros too
    # Clamped: the largest value may be rounded to beyond what the type has, which is NaN in e4m3.
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


def _dequantize(tensor, scale) -> torch.Tensor:
    return tensor.float() * scale


def _round(tensor):
    """To float8 and back; the gradient goes straight through."""
    return tensor.float() + (_dequantize(*_quantize(tensor, torch.float8_e4m3fn)) - tensor.float()).detach()


def _column_major(tensor):
    return tensor.t().contiguous().t()


class _Float8Linear(torch.autograd.Function):
    # Tensor cores take the first operand of a float8 product row-major and the second column-major, in no other way.

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        x, x_scale = _quantize(x, torch.float8_e4m3fn)
        weight, weight_scale = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, x_scale, weight, weight_scale)
        # Partial sums are kept in fewer bits in the forward product only: gradients need them all.
        return torch._scaled_mm(
            x, weight.t(), x_scale, weight_scale, bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx, gradient):
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        bias_gradient = gradient.sum(dim=0, dtype=torch.float32)
        gradient, scale = _quantize(gradient, torch.float8_e5m2)
        x_gradient = torch._scaled_mm(gradient, _column_major(weight), scale, weight_scale, out_dtype=torch.bfloat16)
        gradient = gradient.t().contiguous()
        weight_gradient = torch._scaled_mm(gradient, _column_major(x), scale, x_scale, out_dtype=torch.bfloat16)
        gradients = x_gradient, weight_gradient, bias_gradient
        return tuple(tensor.to(dtype) for tensor, dtype in zip(gradients, ctx.dtypes))
