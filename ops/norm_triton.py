"""Dropout, addition and LayerNorm in one Triton kernel forward and one backward, in float32 inside.

The backward kernel also sums columns, of which each program writes its own tokens' share: the gradients of LayerNorm's
weight and bias, and of the bias of the linear layer before.

Shape letters: T tokens, H hidden.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from ops.dropout_triton import LEVELS, draw_seed, keep_mask, on_device, threshold

__all__ = ["dropout_add_norm"]

ELEMENTS = 4096  # of a tile: 32 a thread
TILES = 16  # that a program of the backward pass takes: its sums are then 2 % of what it reads and writes


@triton.jit
def _tile(first, T, H: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    tokens, columns = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside = (tokens < T)[:, None] & (columns < H)[None, :]
    return tokens, tokens.to(tl.int64)[:, None] * H + columns[None, :], inside  # 64 bits: T * H may be beyond 32


@triton.jit
def _norm_forward_kernel(
    x,
    residual,
    weight,
    bias,
    seed,
    normal,
    total,
    statistics,
    T,
    eps,
    THRESHOLD: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens, offsets, inside = _tile(tl.program_id(0) * TOKENS, T, H, TOKENS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD:
        keep = keep_mask(seed, 0, tokens, THRESHOLD, BLOCK)
        values = tl.where(keep, values * (LEVELS / (LEVELS - THRESHOLD)), 0.0)
    values += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + offsets, values.to(total.dtype.element_ty), mask=inside)
    mean = tl.sum(values, axis=1) / H
    centered = tl.where(inside, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / H + eps)
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < H, other=0.0).to(tl.float32)
    result = centered * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(normal + offsets, result.to(normal.dtype.element_ty), mask=inside)
    tl.store(statistics + tokens, mean, mask=tokens < T)
    tl.store(statistics + T + tokens, rstd, mask=tokens < T)


@triton.jit
def _norm_backward_kernel(
    gradient,
    total,
    statistics,
    weight,
    seed,
    x_gradient,
    residual_gradient,
    sums,
    T,
    THRESHOLD: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        tokens, offsets, inside = _tile((tl.program_id(0) * TILES + tile) * TOKENS, T, H, TOKENS, BLOCK)
        g = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + tokens, mask=tokens < T, other=0.0)
        rstd = tl.load(statistics + T + tokens, mask=tokens < T, other=0.0)
        normal = (tl.load(total + offsets, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        weight_sum += tl.sum(g * normal, axis=0)
        bias_sum += tl.sum(g, axis=0)
        g *= w[None, :]
        along, constant = tl.sum(g * normal, axis=1) / H, tl.sum(g, axis=1) / H
        g = tl.where(inside, (g - constant[:, None] - normal * along[:, None]) * rstd[:, None], 0.0)
        tl.store(residual_gradient + offsets, g.to(residual_gradient.dtype.element_ty), mask=inside)
        if THRESHOLD:
            g = tl.where(keep_mask(seed, 0, tokens, THRESHOLD, BLOCK), g * (LEVELS / (LEVELS - THRESHOLD)), 0.0)
        tl.store(x_gradient + offsets, g.to(x_gradient.dtype.element_ty), mask=inside)
        x_sum += tl.sum(g, axis=0)
    sums += tl.program_id(0) * 3 * H + columns
    tl.store(sums, weight_sum, mask=columns < H)
    tl.store(sums + H, bias_sum, mask=columns < H)
    tl.store(sums + 2 * H, x_sum, mask=columns < H)


def dropout_add_norm(x, x_bias, residual, weight, bias, eps: float, dropout: float) -> torch.Tensor:
    """LayerNorm(dropout(x) + residual): x, residual [T, H] contiguous, the others [H] -> [T, H].

    x_bias is the one that x has in it already, the linear layer's: given here, its gradient, which is x's summed over
    tokens, costs no pass of its own.
    """
    seed = draw_seed(x.device) if dropout else None
    return _norm(x, x_bias, residual, weight, bias, seed, eps, dropout)[0]


def _tiling(hidden: int) -> Tuple[int, int]:
    block = triton.next_power_of_2(hidden)
    return max(1, ELEMENTS // block), block


@torch.library.custom_op("bert::dropout_add_norm", mutates_args=())
def _norm(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: Optional[torch.Tensor],
    eps: float,
    dropout: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _norm_shapes(x, x_bias, residual, weight, bias, seed, eps, dropout)
    tensors, (tokens, block) = (x.contiguous(), residual.contiguous(), weight, bias, seed), _tiling(x.shape[1])
    sizes = len(x), eps, threshold(dropout), x.shape[1], tokens, block
    with on_device(x):
        _norm_forward_kernel[(triton.cdiv(len(x), tokens),)](*tensors, *outputs, *sizes)
    return outputs


@_norm.register_fake
def _norm_shapes(x, x_bias, residual, weight, bias, seed, eps, dropout):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(2, len(x), dtype=torch.float32)


@torch.library.custom_op("bert::dropout_add_norm_backward", mutates_args=())
def _norm_backward(
    gradient: torch.Tensor,
    total: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    seed: Optional[torch.Tensor],
    dropout: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, block = _tiling(total.shape[1])
    programs, width = triton.cdiv(len(total), tokens * TILES), total.shape[1]
    gradients = torch.empty_like(total), torch.empty_like(total)
    sums = total.new_empty(programs, 3, width, dtype=torch.float32)
    tensors, sizes = (gradient.contiguous(), total, statistics, weight, seed), (width, tokens, block, TILES)
    with on_device(total):
        _norm_backward_kernel[(programs,)](*tensors, *gradients, sums, len(total), threshold(dropout), *sizes)
    return (*gradients, sums.sum(dim=0).to(weight.dtype))


@_norm_backward.register_fake
def _(gradient, total, statistics, weight, seed, dropout):
    return torch.empty_like(total), torch.empty_like(total), weight.new_empty(3, total.shape[1])


def _save(ctx, inputs, output):
    _, _, _, weight, _, seed, _, ctx.dropout = inputs
    ctx.save_for_backward(*output[1:], weight, seed)


def _gradients(ctx, gradient, *_):
    x_gradient, residual_gradient, sums = _norm_backward(gradient, *ctx.saved_tensors, ctx.dropout)
    return x_gradient, sums[2], residual_gradient, sums[0], sums[1], None, None, None


_norm.register_autograd(_gradients, setup_context=_save)
