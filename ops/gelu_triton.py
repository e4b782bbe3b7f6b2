"""The exact GELU (arXiv 1606.08415) in Triton, and a backward pass that also sums columns: the gradient of the bias of
the linear layer before.

Shape letters: T tokens, F features.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl

from ops.dropout_triton import on_device

__all__ = ["gelu"]

BLOCK = 1024  # elements that a program of the forward pass takes: 8 a thread
TOKENS, FEATURES, TILES = 8, 256, 16  # of a program of the backward pass: 16 tiles of 8 tokens, 16 elements a thread


@triton.jit
def _normal_distribution(x):
    """P(X <= x) and the density at x, both of one exponential: PyTorch's form has two, and more arithmetic than fits
    into the time that the memory takes.

    The error function is 7.1.26 of Abramowitz and Stegun, whose error is below 1.5e-7: about float32's.
    """
    t = 1 / (1 + 0.231641888 * tl.abs(x))
    series = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    exponential = tl.exp2(x * (x * -0.7213475204444817))  # exp(-x^2 / 2)
    tail = series * exponential
    return tl.where(x < 0, tail, 1 - tail), 0.3989422804014327 * exponential


@triton.jit
def _gelu_forward_kernel(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    below, _ = _normal_distribution(values)
    tl.store(y + offsets, (values * below).to(y.dtype.element_ty), mask=offsets < size)


@triton.jit
def _gelu_backward_kernel(
    gradient,
    x,
    x_gradient,
    sums,
    T,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    TILES: tl.constexpr,
):
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    feature_sum = tl.zeros([FEATURES], tl.float32)
    for tile in range(TILES):
        tokens = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        offsets = tokens.to(tl.int64)[:, None] * F + features[None, :]
        inside = (tokens < T)[:, None] & (features < F)[None, :]
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        below, density = _normal_distribution(values)
        g = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32) * (below + values * density)
        tl.store(x_gradient + offsets, g.to(x_gradient.dtype.element_ty), mask=inside)
        feature_sum += tl.sum(g, axis=0)
    tl.store(sums + tl.program_id(0) * F + features, feature_sum, mask=features < F)


def gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [T, F] -> [T, F]. `bias` [F] is the one that x has in it already, the linear layer's: given here, its gradient,
    which is x's summed over tokens, costs no pass of its own."""
    return _gelu(x, bias)


@torch.library.custom_op("bert::gelu", mutates_args=())
def _gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device(x):
        _gelu_forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.contiguous(), y, x.numel(), BLOCK)
    return y


@_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("bert::gelu_backward", mutates_args=())
def _gelu_backward(gradient: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    tokens, features = x.shape
    grid = triton.cdiv(tokens, TOKENS * TILES), triton.cdiv(features, FEATURES)
    x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = x.new_empty(grid[0], features, dtype=torch.float32)
    tensors, sizes = (gradient.contiguous(), x.contiguous(), x_gradient, sums), (TOKENS, FEATURES, TILES)
    with on_device(x):
        _gelu_backward_kernel[grid](*tensors, tokens, features, *sizes)
    return x_gradient, sums.sum(dim=0).to(bias.dtype)


@_gelu_backward.register_fake
def _(gradient, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient):
    return _gelu_backward(gradient, *ctx.saved_tensors)


_gelu.register_autograd(_gradients, setup_context=_save)
