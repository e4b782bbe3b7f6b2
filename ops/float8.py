"""Linear layers whose three products are float8: activations and weights e4m3, gradients e5m2, one scale a tensor
(arXiv 2209.05433).

A scale is the power of two that brings the largest value of the tensor itself into range; no history is kept. Of a
large tensor it is taken from 16 values of each row, with room for values 4 times as large as those. A pass over all of
it would cost a third of what float8 gains, by estimate, and scales of earlier steps would have to be in checkpoints for
a resumed run to be the same. Weights, biases and their gradients have the types that they have elsewhere.

Shape letters: T tokens (any leading dimensions), I input features, O output features.
"""

import contextlib
from typing import Tuple

import torch
import torch.nn.functional as F

__all__ = ["float8", "float8_linear", "float8_linear_plain", "is_float8", "pays"]

MULTIPLE = 16  # what each dimension of a float8 product must be a multiple of
SMALL = 2**23  # values of a tensor, at most, whose scale is taken from all of them
ROOM = 4.0  # for larger ones beside those that a scale is taken from
# I * O / (I + O) of a layer, at least: what its products gain grows with I * O, what its float8 costs with I + O.
PAYS = 256

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


def pays(weight: torch.Tensor) -> bool:
    """Whether float8 makes a layer of this weight [O, I] faster; the CPU, which emulates it, takes it for all."""
    outputs, inputs = weight.shape
    return weight.device.type == "cpu" or inputs * outputs >= PAYS * (inputs + outputs)


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
    product = F.linear(_round_through(x), _round_through(weight))
    if product.requires_grad:
        product.register_hook(lambda gradient: _round(gradient, torch.float8_e5m2))
    return (product + bias).to(x.dtype)


def _quantize(
    x: torch.Tensor, dtype: torch.dtype, with_sums: bool = False
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, F] in float8, [T, F]; its transpose, [F, T]; the sums of x's columns, [F] float32, if asked for; and the
    scale."""
    x = x.contiguous()
    scale = _scale(x, dtype)
    if x.device.type != "cpu":
        from ops.float8_triton import quantize

        return (*quantize(x, scale, dtype, with_sums), scale)
    quantized = _cast(x, scale, dtype)
    return quantized, quantized.t().contiguous(), x.sum(dim=0, dtype=torch.float32) if with_sums else scale, scale


def _scale(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What x [T, F], contiguous, is divided by: a power of two, which rounds nothing, as a float32 scalar."""
    room, step = 1.0, max(1, x.shape[-1] // MULTIPLE - 1)
    if x.numel() > SMALL and step > 1:
        # Of each row 16 values, and others of the next row: along diagonals, so that no row and no column is left out.
        room, x = ROOM, x.view(-1, MULTIPLE)[::step]
    largest = x.abs().amax().float().clamp(min=1e-30)  # above 0 for a tensor of zeros too
    return torch.exp2(torch.ceil(torch.log2(largest * (room / torch.finfo(dtype).max))))


def _cast(x, scale, dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    scaled = x.float() / scale
    # Cut off: beyond what it has, e4m3 has NaN only. What is not finite stays so, for the update to be left out.
    return torch.where(scaled.isfinite(), scaled.clamp(-largest, largest), torch.nan).to(dtype)


def _dequantize(tensor, scale) -> torch.Tensor:
    return tensor.float() * scale


def _round(tensor, dtype):
    scale = _scale(tensor.contiguous(), dtype)
    return _dequantize(_cast(tensor, scale, dtype), scale)


def _round_through(tensor):
    """To float8 and back; the gradient goes straight through."""
    return tensor.float() + (_round(tensor, torch.float8_e4m3fn) - tensor.float()).detach()


class _Float8Linear(torch.autograd.Function):
    # Of what the backward pass needs only the transpose is kept, half of bfloat16's memory. Tensor cores take the first
    # operand of a float8 product row-major and the second column-major, in no other way.

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        x, x_transposed, _, x_scale = _quantize(x, torch.float8_e4m3fn)
        weight, weight_transposed, _, weight_scale = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x_transposed, x_scale, weight_transposed, weight_scale)
        # Partial sums are kept in fewer bits in the forward product only: gradients need them all.
        return torch._scaled_mm(
            x, weight.t(), x_scale, weight_scale, bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx, gradient):
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        wants_sums = ctx.needs_input_grad[2]
        gradient, transposed, sums, scale = _quantize(gradient, torch.float8_e5m2, wants_sums)
        x_gradient = torch._scaled_mm(gradient, weight.t(), scale, weight_scale, out_dtype=torch.bfloat16)
        weight_gradient = torch._scaled_mm(transposed, x.t(), scale, x_scale, out_dtype=torch.bfloat16)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        bias_gradient = sums.to(bias_dtype) if wants_sums else None
        return x_gradient.to(x_dtype), weight_gradient.to(weight_dtype), bias_gradient
