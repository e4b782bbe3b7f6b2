"""Attention within samples of at most 128 tokens in Triton: a sample and head is one program, and its scores one tile.

So a query's whole row of weights is at hand: the backward pass is one kernel, does not read the context, adds up
nothing across programs, and gives the same bits each time.

Shape letters: T tokens in all, N samples, A heads, D head size, H = A * D.
"""

import math
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from ops.dropout_triton import LEVELS, draw_seed, keep_mask, on_device, threshold

__all__ = ["varlen_attention"]

# At a time in the backward pass, where matrix units read registers, which are few; Hopper's read shared memory.
QUERIES = 32
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _span(cu_seqlens, A: tl.constexpr):
    """The program's sample: its first token and length; and the head."""
    program = tl.program_id(0)
    first = tl.load(cu_seqlens + program // A)
    return first.to(tl.int64), tl.load(cu_seqlens + program // A + 1) - first, program % A


@triton.jit
def _load(tensor, tokens, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    lanes = tl.arange(0, BLOCK_D)
    inside = (tokens < length)[:, None] & (lanes < D)[None, :]
    return tl.load(tensor + tokens[:, None] * stride + lanes[None, :], mask=inside, other=0.0)


@triton.jit
def _store(tensor, tokens, length, stride, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    lanes = tl.arange(0, BLOCK_D)
    inside = (tokens < length)[:, None] & (lanes < D)[None, :]
    tl.store(tensor + tokens[:, None] * stride + lanes[None, :], values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _attention_forward_kernel(
    query,
    key,
    value,
    cu_seqlens,
    seed,
    context,
    normalizers,
    T,
    query_stride,
    key_stride,
    value_stride,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length, head = _span(cu_seqlens, A)
    if length == 0:
        return
    tokens = tl.arange(0, BLOCK)
    q = _load(query + first * query_stride + head * D, tokens, length, query_stride, D, BLOCK_D)
    k = _load(key + first * key_stride + head * D, tokens, length, key_stride, D, BLOCK_D)
    scores = SCALE * tl.dot(q, tl.trans(k), input_precision="ieee")  # base 2: exp2 is what the hardware has
    scores = tl.where((tokens < length)[None, :], scores, float("-inf"))
    highest = tl.max(scores, axis=1)
    weights = tl.exp2(scores - highest[:, None])
    total = tl.sum(weights, axis=1)
    tl.store(normalizers + head.to(tl.int64) * T + first + tokens, highest + tl.log2(total), mask=tokens < length)
    if THRESHOLD:
        weights = tl.where(keep_mask(seed, tl.program_id(0), tokens, THRESHOLD, BLOCK), weights, 0.0)
        total *= 1 - THRESHOLD / LEVELS
    v = _load(value + first * value_stride + head * D, tokens, length, value_stride, D, BLOCK_D)
    mean = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / total[:, None]
    _store(context + (first * A + head) * D, tokens, length, A * D, mean, D, BLOCK_D)


@triton.jit
def _attention_backward_kernel(
    gradient,
    query,
    key,
    value,
    cu_seqlens,
    seed,
    normalizers,
    gradients,
    T,
    query_stride,
    key_stride,
    value_stride,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):
    first, length, head = _span(cu_seqlens, A)
    if length == 0:
        return
    keys = tl.arange(0, BLOCK)
    key += first * key_stride + head * D
    value += first * value_stride + head * D
    query += first * query_stride + head * D
    gradient += (first * A + head) * D
    gradients += (first * 3 * A + head) * D
    normalizers += head.to(tl.int64) * T + first
    k_gradient = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_gradient = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(0, BLOCK, QUERIES):
        # Read anew for each block of queries: held, they would fill the registers.
        k = _load(key, keys, length, key_stride, D, BLOCK_D)
        v = _load(value, keys, length, value_stride, D, BLOCK_D)
        queries = begin + tl.arange(0, QUERIES)
        q = _load(query, queries, length, query_stride, D, BLOCK_D)
        g = _load(gradient, queries, length, A * D, D, BLOCK_D)
        normalizer = tl.load(normalizers + queries, mask=queries < length, other=float("inf"))
        scores = SCALE * tl.dot(q, tl.trans(k), input_precision="ieee")
        weights = tl.where((keys < length)[None, :], tl.exp2(scores - normalizer[:, None]), 0.0)
        weights_gradient = tl.dot(g, tl.trans(v), input_precision="ieee")
        dropped = weights
        if THRESHOLD:
            keep = keep_mask(seed, tl.program_id(0), queries, THRESHOLD, BLOCK)
            dropped = tl.where(keep, weights * (LEVELS / (LEVELS - THRESHOLD)), 0.0)
            weights_gradient = tl.where(keep, weights_gradient * (LEVELS / (LEVELS - THRESHOLD)), 0.0)
        v_gradient = tl.dot(tl.trans(dropped.to(g.dtype)), g, v_gradient, input_precision="ieee")
        mean = tl.sum(weights * weights_gradient, axis=1)
        scores_gradient = (weights * (weights_gradient - mean[:, None])).to(q.dtype)
        k_gradient = tl.dot(tl.trans(scores_gradient), q, k_gradient, input_precision="ieee")
        q_gradient = tl.dot(scores_gradient, k, input_precision="ieee")
        # SCALE is in base 2, the gradients are not.
        _store(gradients, queries, length, 3 * A * D, q_gradient * (SCALE * LN2), D, BLOCK_D)
    k_gradient *= SCALE * LN2
    _store(gradients + A * D, keys, length, 3 * A * D, k_gradient, D, BLOCK_D)
    _store(gradients + 2 * A * D, keys, length, 3 * A * D, v_gradient, D, BLOCK_D)


def varlen_attention(query, key, value, cu_seqlens, max_seqlen: int, heads: int, dropout: float) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V within samples: query, key, value [T, H], of which one row may be apart from the next
    by any number, cu_seqlens [N + 1] int32 from 0 to T -> [T, H].

    max_seqlen is at least the longest sample's tokens, and at most 128; so is D. The gradients of query, key and value
    are views of one tensor [T, 3 H]: where they were one, a compiler need not put its gradient together.
    """
    seed = draw_seed(query.device) if dropout else None
    return _attention(query, key, value, cu_seqlens, seed, max_seqlen, heads, dropout)[0]


def _sizes(query, key, value, max_seqlen, heads, dropout):
    """What follows the tensors in both kernels' arguments."""
    size, block = query.shape[1] // heads, max(16, triton.next_power_of_2(max_seqlen))
    scale, strides = math.log2(math.e) / math.sqrt(size), (query.stride(0), key.stride(0), value.stride(0))
    return len(query), *strides, scale, threshold(dropout), heads, size, max(16, triton.next_power_of_2(size)), block


def _queries(query, block):
    is_hopper = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] == 9
    return block if is_hopper else min(block, QUERIES)


@torch.library.custom_op("bert::varlen_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seed: Optional[torch.Tensor],
    max_seqlen: int,
    heads: int,
    dropout: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    context, normalizers = _attention_shapes(query, key, value, cu_seqlens, seed, max_seqlen, heads, dropout)
    tensors, sizes = (query, key, value, cu_seqlens), _sizes(query, key, value, max_seqlen, heads, dropout)
    with on_device(query):
        _attention_forward_kernel[((len(cu_seqlens) - 1) * heads,)](
            *tensors, seed, context, normalizers, *sizes, num_warps=8
        )
    return context, normalizers


@_attention.register_fake
def _attention_shapes(query, key, value, cu_seqlens, seed, max_seqlen, heads, dropout):
    return query.new_empty(query.shape), query.new_empty(heads, len(query), dtype=torch.float32)


@torch.library.custom_op("bert::varlen_attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seed: Optional[torch.Tensor],
    normalizers: torch.Tensor,
    max_seqlen: int,
    heads: int,
    dropout: float,
) -> torch.Tensor:
    gradients = query.new_empty(len(query), 3 * query.shape[1])
    tensors = gradient.contiguous(), query, key, value, cu_seqlens, seed, normalizers, gradients
    sizes = _sizes(query, key, value, max_seqlen, heads, dropout)
    grid, queries = ((len(cu_seqlens) - 1) * heads,), _queries(query, sizes[-1])
    with on_device(query):
        _attention_backward_kernel[grid](*tensors, *sizes, queries, num_warps=8, num_stages=1)
    return gradients


@_attention_backward.register_fake
def _(gradient, query, *rest):
    return query.new_empty(len(query), 3 * query.shape[1])


def _save(ctx, inputs, output):
    query, key, value, cu_seqlens, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, seed, output[1])


def _gradients(ctx, gradient, _):
    gradients = _attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return (*gradients.split([gradient.shape[1]] * 3, dim=1), None, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_save)
