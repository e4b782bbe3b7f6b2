"""Tokens of each row, selected by index or (for the IPU, which gathers slowly) in a one-hot product; embeddings.

Shape letters: R rows, L tokens of a row, K selected tokens of a row, T tokens in all, V vocabulary, H hidden.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.ipu import is_lowering, matmul_memory
from ops.native import grad_of, is_native

__all__ = ["embed", "gather_tokens", "gather_tokens_one_hot"]

ONE_HOT_ROWS = 1024  # of an embedding, at most, whose gradient is a one-hot product on CUDA
FEW_IDS = 3072  # for which, at most, PyTorch on CUDA adds up an embedding's gradient in the type that it has


def gather_tokens(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden [R, L, H] at positions [R, K] (integers in 0..L-1) -> [R, K, H]; [T, H] at positions [K] -> [K, H]."""
    if is_lowering():
        return gather_tokens_one_hot(hidden, positions)
    if hidden.dim() == 2:
        return hidden.index_select(0, positions)
    rows, length, _ = hidden.shape
    first = torch.arange(0, rows * length, length, device=hidden.device)[:, None]
    return hidden.flatten(0, 1).index_select(0, (positions + first).flatten()).unflatten(0, positions.shape)


def gather_tokens_one_hot(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same of rows as a matrix product: one_hot(positions) @ hidden."""
    return matmul_memory(F.one_hot(positions.long(), hidden.shape[1]).to(hidden.dtype) @ hidden, "select_tokens")


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding: ids (integers, any shape) of weight [V, H] -> ids' shape and H.

    On the IPU, PopART's TiedGather pattern cuts the gather into as many parts as the decoder's product of the same
    weight; written out in parts here it would not match, and each part would get a dense gradient.
    """
    if weight.is_cuda and len(weight) <= ONE_HOT_ROWS:
        return _EmbedOneHot.apply(ids, weight)
    if is_native(parameters=(weight,)):
        return _Embed.apply(ids, weight)
    rounds = weight.dtype == torch.bfloat16 and (not weight.is_cuda or ids.numel() <= FEW_IDS)
    return _EmbedSummed.apply(ids, weight) if rounds else F.embedding(ids, weight)


class _Embed(torch.autograd.Function):
    # Adds the few rows that a micro-batch uses to weight.grad, where F.embedding makes a gradient of all V rows.
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        grad_of(ctx.weight).index_add_(0, ctx.saved_tensors[0].flatten(), gradient.flatten(0, -2).float())
        return None, None


class _EmbedSummed(torch.autograd.Function):
    # F.embedding's gradient on the CPU adds a frequent token's thousands of terms in bfloat16.
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(gradient.float(), ids, ctx.rows, -1, False)
        return None, total.to(gradient.dtype)


class _EmbedOneHot(torch.autograd.Function):
    # F.embedding's gradient on CUDA adds up a row's tokens one after the other, and of two token types each has half of
    # all tokens.
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        rows = torch.arange(-(-ctx.rows // 8) * 8, device=ids.device)  # the matrix units take multiples of 8
        one_hot = (ids.flatten()[:, None] == rows).to(gradient.dtype)
        return None, (one_hot.t() @ gradient.flatten(0, -2))[: ctx.rows]
