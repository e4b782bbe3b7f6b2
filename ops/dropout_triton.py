"""What the Triton kernels share: dropout's mask, which both passes draw and nobody stores.

One call of Philox (Salmon et al., SC 2011; 7 rounds pass their tests of randomness, and flash attention takes as many)
gives 128 bits: 16 for each of 8 elements. It costs about as much as reading 40 bytes, so no bit is left over.
"""

import contextlib
from typing import ContextManager

import torch
import triton
import triton.language as tl

__all__ = ["LEVELS", "draw_seed", "keep_mask", "on_device", "threshold"]

LEVELS = tl.constexpr(65536)


@triton.jit
def keep_mask(seed, stream, rows, THRESHOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of some rows [B] are kept, [B, COLUMNS] bool: a function of seed, stream, row and column."""
    zero = tl.zeros([rows.shape[0], COLUMNS // 8], tl.int32)
    groups = tl.arange(0, COLUMNS // 8)
    counters = zero + groups[None, :], zero + rows[:, None], zero + stream
    a, b, c, d = tl.philox(tl.load(seed), counters[0], counters[1], counters[2], zero, n_rounds=7)
    bits = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.join((bits & 0xFFFF) >= THRESHOLD, (bits >> 16) >= THRESHOLD), [rows.shape[0], COLUMNS])


def threshold(dropout: float) -> int:
    """Of 65,536 values, those below this one drop an element."""
    return round(dropout * LEVELS.value)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed [1] on the device, from PyTorch's generator: the host does not wait for it."""
    return torch.randint(2**31 - 1, (1,), device=device)


def on_device(tensor: torch.Tensor) -> ContextManager:
    """Where Triton launches: it takes the current device, not the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
