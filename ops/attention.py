"""Attention within samples: the plain form, and PyTorch's fused one.

Shape letters: R rows, A heads, L tokens of a row, D head size.
"""

import math

import torch
import torch.nn.functional as F

from ops.ipu import is_lowering

__all__ = ["attention", "attention_plain", "same_sample_mask"]


def same_sample_mask(sample_ids: torch.Tensor) -> torch.Tensor:
    """[R, L] sample ids -> [R, 1, L, L] bool, True where two tokens belong to one sample.

    Padding (0) attends to padding, so that no softmax is over nothing; no real token sees it.
    """
    return (sample_ids[:, :, None] == sample_ids[:, None, :])[:, None]


def attention(query, key, value, mask, dropout: float) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V over [R, A, L, D], where `mask` (bool, broadcastable to [R, A, L, L]) is True (arXiv 1706.03762, eq. 1).

    `dropout` is the probability that an attention weight is dropped: 0 where the model is not in training.
    """
    if is_lowering():
        return attention_plain(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attention_plain(query, key, value, mask, dropout: float) -> torch.Tensor:
    """The same, written out: what PopTorch lowers, and what the fused form is held to."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    # -1e4 is within float16's range and far below any score: its softmax is 0.
    weights = torch.softmax(scores.masked_fill(~mask, -1e4), dim=-1)
    return F.dropout(weights, dropout) @ value
