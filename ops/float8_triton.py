"""Float8 of a matrix, of its transpose, and the sums of its columns in one Triton kernel, which reads the matrix once.

Shape letters: T tokens (or another dimension of rows), F features.
"""

import contextlib
from typing import Tuple

import torch
import triton
import triton.language as tl

__all__ = ["quantize"]

BLOCK_T, BLOCK_F = 128, 64  # of a program: whole cache lines of the matrix and of its transpose, 64 values a thread


@triton.jit
def _quantize_kernel(
    x,
    scale,
    quantized,
    transposed,
    sums,
    T,
    F,
    LARGEST: tl.constexpr,
    FLOAT8: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Features first: programs that run together read whole rows.
    f, t = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    by_row = t[:, None].to(tl.int64) * F + f[None, :]  # 64 bits: T * F is beyond 32
    inside = (t[:, None] < T) & (f[None, :] < F)
    values = tl.load(x + by_row, mask=inside, other=0.0).to(tl.float32)
    if SUMS:
        tl.store(sums + tl.program_id(1).to(tl.int64) * F + f, tl.sum(values, axis=0), mask=f < F)
    scaled = values * (1.0 / tl.load(scale))  # exact: a power of two
    result = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(FLOAT8).to(tl.uint8, bitcast=True)
    # What is not finite stays so, for the update to be left out. 0x7F is NaN in both types.
    result = tl.where(tl.abs(scaled) < float("inf"), result, 0x7F).to(tl.uint8)
    tl.store(quantized + by_row, result, mask=inside)
    by_column = f[:, None].to(tl.int64) * T + t[None, :]
    tl.store(transposed + by_column, tl.trans(result), mask=(f[:, None] < F) & (t[None, :] < T))


@torch.library.custom_op("bert::quantize_float8", mutates_args=())
def quantize(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, with_sums: bool
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, F] (float32 or bfloat16, contiguous) divided by `scale`, a float32 scalar and power of two, in float8.

    Returns it as [T, F] and as [F, T], both contiguous, and the sums of x's columns, [F] float32 ([0] without
    `with_sums`). What is beyond the range of `dtype` is cut off; what is not finite is NaN.
    """
    (T, F), empty = x.shape, torch.empty
    quantized, transposed = [empty(shape, dtype=dtype, device=x.device) for shape in ((T, F), (F, T))]
    grid = triton.cdiv(F, BLOCK_F), triton.cdiv(T, BLOCK_T)
    bits, largest = [tensor.view(torch.uint8) for tensor in (quantized, transposed)], torch.finfo(dtype).max
    float8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}[dtype]
    sums = empty((grid[1], F) if with_sums else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _quantize_kernel[grid](x, scale, *bits, sums, T, F, largest, float8, with_sums, BLOCK_T, BLOCK_F)
    return quantized, transposed, sums.sum(dim=0) if with_sums else sums


@quantize.register_fake
def _(x, scale, dtype, with_sums):
    (T, F), empty = x.shape, x.new_empty
    return empty(T, F, dtype=dtype), empty(F, T, dtype=dtype), empty(F if with_sums else 0, dtype=torch.float32)
