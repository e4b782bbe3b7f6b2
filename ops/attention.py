"""Attention within samples: the plain form, PyTorch's fused one on rows, and variable-length kernels for tokens laid
end to end.

Shape letters: R rows, L tokens of a row, T tokens in all, N samples, A heads, D head size.
"""

import math
from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.cuda import takes_triton
from ops.ipu import is_lowering, matmul_memory
from ops.native import call, draw_seed, is_native

__all__ = [
    "CuSeqlens",
    "SampleIds",
    "SampleMask",
    "Segments",
    "attention",
    "attention_plain",
    "for_layers",
    "has_varlen_kernel",
    "same_sample_mask",
]


class SampleIds(NamedTuple):
    """Which sample of its row each token belongs to."""

    ids: torch.Tensor
    """[R, L], of any type; 0 is padding"""


class SampleMask(NamedTuple):
    """Which tokens of a row see each other."""

    mask: torch.Tensor
    """bool, broadcastable to [R, A, L, L], True where one token sees another"""


class CuSeqlens(NamedTuple):
    """Samples laid end to end: sample n has the tokens from cu_seqlens[n] up to cu_seqlens[n + 1]."""

    cu_seqlens: torch.Tensor
    """[N + 1] int32, from 0 to T"""
    max_seqlen: int
    """tokens of the longest sample, at least: a bound that stays from batch to batch, or compiled layers are compiled
    anew"""


TRITON_LONGEST, TRITON_LARGEST = 128, 64  # tokens of a sample and head size that ops/attention_triton.py has room for

Segments = Union[SampleIds, SampleMask, CuSeqlens]


def for_layers(segments: Segments, dtype: torch.dtype) -> Segments:
    """What the encoder's layers take, made once a forward pass: sample ids become a mask, which the layers share.

    On the IPU they stay ids, in the type of the hidden state: an input may go to one IPU only, and ids are small enough
    to be sent on to the others, where each layer makes its mask.
    """
    if isinstance(segments, SampleIds):
        return SampleIds(segments.ids.to(dtype)) if is_lowering() else SampleMask(same_sample_mask(segments.ids))
    return segments


def same_sample_mask(sample_ids: torch.Tensor) -> torch.Tensor:
    """[R, L] sample ids -> [R, 1, L, L] bool, True where two tokens belong to one sample.

    Padding (0) attends to padding, so that no softmax is over nothing; no real token sees it.
    """
    return (sample_ids[:, :, None] == sample_ids[:, None, :])[:, None]


def has_varlen_kernel(device: str, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `attention` takes `CuSeqlens`: in C++ on the CPU, in CUDA's flash attention in half precision."""
    if device == "cpu":
        return is_native(torch.empty(0, dtype=dtype)) and (dtype == torch.float32 or head_size % 2 == 0)
    fits = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    return fits and torch.cuda.get_device_capability() >= (8, 0)


def attention(query, key, value, segments: Segments, heads: int, dropout: float) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V within samples (arXiv 1706.03762, eq. 1).

    The type of `segments` says how it is computed. With `SampleMask` (PyTorch's fused form) and `SampleIds` (the form
    that PopTorch lowers: no mask is kept or sent from IPU to IPU) the others are rows, [R, L, A * D]; with `CuSeqlens`
    they are tokens laid end to end, [T, A * D]. `dropout` is the probability that an attention weight is dropped: 0
    outside of training.
    """
    if isinstance(segments, CuSeqlens):
        if takes_triton(query) and segments.max_seqlen <= TRITON_LONGEST and query.shape[1] <= TRITON_LARGEST * heads:
            from ops.attention_triton import varlen_attention

            return varlen_attention(query, key, value, *segments, heads, dropout)
        if query.device.type != "cpu":
            return _flash_attention(query, key, value, segments, heads, dropout)
        fits = has_varlen_kernel("cpu", query.dtype, query.shape[1] // heads) and is_native(query, key, value)
        if not fits or segments.cu_seqlens.dtype != torch.int32:
            takes = "float32, or bfloat16 of even heads, int32 cu_seqlens and a C++ compiler"
            found = f"{query.dtype} of heads of {query.shape[1] // heads} and {segments.cu_seqlens.dtype}"
            raise ValueError(f"attention within cu_seqlens on the CPU takes {takes}, not {found}")
        tensors = query.contiguous(), key.contiguous(), value.contiguous()
        return _VarlenAttention.apply(*tensors, segments.cu_seqlens, heads, dropout)
    query, key, value = [tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
    if isinstance(segments, SampleIds):
        context = attention_plain(query, key, value, same_sample_mask(segments.ids), dropout)
    else:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=segments.mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


def attention_plain(query, key, value, mask, dropout: float) -> torch.Tensor:
    """The same of [R, A, L, D], written out: PopTorch lowers it, and the fused forms are tested against it."""
    # The queries are divided, not the scores: they are fewer, and float16 scores stay small.
    scores = matmul_memory((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2), "attention_scores")
    # -1e4 is within float16's range and far below any score: its softmax is 0.
    weights = torch.softmax(scores.masked_fill(~mask, -1e4), dim=-1)
    return matmul_memory((F.dropout(weights, dropout) if dropout else weights) @ value, "attention_context")


def _flash_attention(query, key, value, segments, heads, dropout):
    # PyTorch's own flash attention: torch.nn.attention.varlen wraps the same kernel, but without dropout.
    query, key, value = [tensor.unflatten(-1, (heads, -1)) for tensor in (query, key, value)]
    starts, longest = segments
    return torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, dropout, False, False
    )[0].flatten(1)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, cu_seqlens, heads, dropout):
        context, normalizers = torch.empty_like(query), torch.empty(len(query), heads)
        ctx.sizes = len(cu_seqlens) - 1, heads, query.shape[1] // heads, float(dropout), draw_seed() if dropout else 0
        call("attention_forward", query, key, value, cu_seqlens, context, normalizers, *ctx.sizes)
        ctx.save_for_backward(query, key, value, cu_seqlens, context, normalizers)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, cu_seqlens, context, normalizers = ctx.saved_tensors
        gradients = [torch.empty_like(query) for _ in range(3)]
        saved = query, key, value, cu_seqlens, context, normalizers
        call("attention_backward", gradient.contiguous(), *saved, *gradients, *ctx.sizes)
        return (*gradients, None, None, None)
