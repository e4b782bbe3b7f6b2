"""Selecting tokens of each row: by index, and as a one-hot product for the IPU, which gathers slowly.

Shape letters: R rows, L tokens of a row, K selected tokens of a row, H hidden.
"""

import torch
import torch.nn.functional as F

from ops.ipu import is_lowering

__all__ = ["gather_tokens", "gather_tokens_one_hot"]


def gather_tokens(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden [R, L, H] at positions [R, K] (integers in 0..L-1) -> [R, K, H]."""
    if is_lowering():
        return gather_tokens_one_hot(hidden, positions)
    rows, length, _ = hidden.shape
    first = torch.arange(0, rows * length, length, device=hidden.device)[:, None]
    return hidden.flatten(0, 1).index_select(0, (positions + first).flatten()).unflatten(0, positions.shape)


def gather_tokens_one_hot(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same as a matrix product: one_hot(positions) @ hidden."""
    return F.one_hot(positions.long(), hidden.shape[1]).to(hidden.dtype) @ hidden
