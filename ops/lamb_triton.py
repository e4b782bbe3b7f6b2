"""LAMB over all parameters at once in three Triton kernels (ops/lamb.py says the equations); the host waits for
nothing.

1. For each chunk of a parameter: the squares of the norms of weight and update, and whether a gradient is not finite.
Writes nothing else. 2. For each parameter: learning rate * trust ratio, from its chunks in a fixed order; whether the
update is skipped, and how often by now. 3. For each chunk: the update once more, and moments, weights and bfloat16
copies written.

That moves 44 bytes a parameter, 2 more for a copy: as many as reading the gradients alone first, with a launch less.
"""

import contextlib
from typing import Dict, List, Optional

import torch
import triton
import triton.language as tl

__all__ = ["LambTriton"]

CHUNK = 4096  # elements that one program takes
BLOCK = (
    1024  # of them at a time: one load of 16 bytes a thread and tensor, and few enough registers to have many in flight
)
REDUCED = 1024  # chunks that are added up at a time

# Columns of the tables, which are small and on the device: a gradient may be at another address in each step.
WEIGHT, GRADIENT, EXP_AVG, EXP_AVG_SQ, COPY, SIZE, GROUP, FIRST_CHUNK, CHUNKS, PARAMETER_COLUMNS = map(
    tl.constexpr, range(10)
)
LEARNING_RATE, BETA1, REST1, BETA2, REST2, EPS, WEIGHT_DECAY, TRUST_RATIO, GROUP_COLUMNS = map(tl.constexpr, range(9))


@triton.jit
def _load(address, offsets, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if WHOLE:  # a mask would make it a load for each value
        return tl.load(pointer + offsets)
    return tl.load(pointer + offsets, mask=offsets < size, other=0.0)


@triton.jit
def _store(address, offsets, values, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(values.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if WHOLE:
        tl.store(pointer + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=offsets < size)


@triton.jit
def _tensors(row):
    return tl.load(row + WEIGHT), tl.load(row + GRADIENT), tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)


@triton.jit
def _options(group):
    return (
        tl.load(group + BETA1),
        tl.load(group + REST1),
        tl.load(group + BETA2),
        tl.load(group + REST2),
        tl.load(group + EPS),
        tl.load(group + WEIGHT_DECAY),
    )


@triton.jit
def _update(tensors, options, offsets, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    """Weight, gradient, new moments and update of some elements."""
    weight, gradient, exp_avg, exp_avg_sq = tensors
    beta1, rest1, beta2, rest2, eps, weight_decay = options
    w = _load(weight, offsets, size, WHOLE, ALIGNED)
    g = _load(gradient, offsets, size, WHOLE, ALIGNED)
    m = beta1 * _load(exp_avg, offsets, size, WHOLE, ALIGNED) + rest1 * g
    v = beta2 * _load(exp_avg_sq, offsets, size, WHOLE, ALIGNED) + (rest2 * g) * g
    return w, g, m, v, tl.div_rn(m, tl.sqrt_rn(v) + eps) + weight_decay * w


@triton.jit
def _norms(
    row, group, first, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensors, options = _tensors(row), _options(group)
    # In double: the square of a float always fits.
    weight_square, update_square = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, CHUNK, BLOCK):
        w, g, m, v, u = _update(tensors, options, first + begin + tl.arange(0, BLOCK), size, WHOLE, ALIGNED)
        infinite |= ((g.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        w, u = w.to(tl.float64), u.to(tl.float64)
        weight_square += w * w
        update_square += u * u
    return tl.sum(weight_square, axis=0), tl.sum(update_square, axis=0), tl.max(infinite, axis=0)


@triton.jit
def _norms_kernel(
    parameters,
    groups,
    numbers,
    weight_squares,
    update_squares,
    infinite,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = parameters + tl.load(numbers + chunk) * PARAMETER_COLUMNS
    group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
    size, first = tl.load(row + SIZE), (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    if first + CHUNK <= size:
        weight_square, update_square, found = _norms(row, group, first, size, True, ALIGNED, CHUNK, BLOCK)
    else:
        weight_square, update_square, found = _norms(row, group, first, size, False, ALIGNED, CHUNK, BLOCK)
    tl.store(weight_squares + chunk, weight_square)
    tl.store(update_squares + chunk, update_square)
    tl.store(infinite + chunk, found)


@triton.jit
def _ratios_kernel(
    parameters,
    groups,
    weight_squares,
    update_squares,
    infinite,
    steps,
    skip,
    skipped,
    count,
    chunks,
    REDUCED: tl.constexpr,
):
    number = tl.program_id(0)
    lanes = tl.arange(0, REDUCED)
    if number < count:
        row = parameters + number * PARAMETER_COLUMNS
        group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
        first, own = tl.load(row + FIRST_CHUNK), tl.load(row + CHUNKS)
        weight_square = tl.zeros([REDUCED], tl.float64)
        update_square = tl.zeros([REDUCED], tl.float64)
        begin = 0
        while begin < own:  # no range: Triton's interpreter, with NumPy 2.4, takes no loaded number as its end
            inside = begin + lanes < own
            weight_square += tl.load(weight_squares + first + begin + lanes, mask=inside, other=0.0)
            update_square += tl.load(update_squares + first + begin + lanes, mask=inside, other=0.0)
            begin += REDUCED
        weight_norm, update_norm = tl.sqrt(tl.sum(weight_square, axis=0)), tl.sqrt(tl.sum(update_square, axis=0))
        has_ratio = (tl.load(group + TRUST_RATIO) != 0) & (weight_norm > 0) & (update_norm > 0)
        ratio = tl.where(has_ratio, weight_norm, 1.0) / tl.where(has_ratio, update_norm, 1.0)
        # Not infinite: infinity times an update of 0 would be NaN.
        step = tl.minimum(tl.load(group + LEARNING_RATE).to(tl.float64) * ratio, 3.4028234e38)
        tl.store(steps + number, step.to(tl.float32))
    else:  # one program more, for all of them
        found = tl.zeros([REDUCED], tl.int32)
        begin = 0
        while begin < chunks:
            found |= tl.load(infinite + begin + lanes, mask=begin + lanes < chunks, other=0)
            begin += REDUCED
        any_found = tl.max(found, axis=0)
        tl.store(skip, any_found)
        tl.store(skipped, tl.load(skipped) + any_found)


@triton.jit
def _write(
    row, group, step, first, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensors, options, copy = _tensors(row), _options(group), tl.load(row + COPY)
    weight, _, exp_avg, exp_avg_sq = tensors
    for begin in range(0, CHUNK, BLOCK):
        offsets = first + begin + tl.arange(0, BLOCK)
        w, g, m, v, u = _update(tensors, options, offsets, size, WHOLE, ALIGNED)
        w -= step * u
        _store(exp_avg, offsets, m, size, WHOLE, ALIGNED)
        _store(exp_avg_sq, offsets, v, size, WHOLE, ALIGNED)
        _store(weight, offsets, w, size, WHOLE, ALIGNED)
        if copy != 0:
            # To nearest, ties to even, by hand: Triton's interpreter rounds ties away from zero.
            bits = w.to(tl.uint32, bitcast=True)
            rounded = tl.where(w == w, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
            _store(copy, offsets, rounded.to(tl.uint16), size, WHOLE, ALIGNED)


@triton.jit
def _write_kernel(
    parameters, groups, numbers, steps, skip, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    if tl.load(skip) == 0:
        chunk = tl.program_id(0)
        number = tl.load(numbers + chunk)
        row = parameters + number * PARAMETER_COLUMNS
        group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
        size, first = tl.load(row + SIZE), (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
        if first + CHUNK <= size:
            _write(row, group, tl.load(steps + number), first, size, True, ALIGNED, CHUNK, BLOCK)
        else:
            _write(row, group, tl.load(steps + number), first, size, False, ALIGNED, CHUNK, BLOCK)


class LambTriton:
    """`lamb_native` for CUDA: the same arguments. Keeps its tables on the device and renews those that have changed."""

    def __init__(self):
        self._chunk_counts = self._rows = self._options = None

    def __call__(
        self,
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        copies: List[Optional[torch.Tensor]],
        groups: List[Dict],
        skipped: torch.Tensor,
    ) -> None:
        device, distinct = skipped.device, list({id(group): group for group in groups}.values())
        chunk_counts = [-(-w.numel() // CHUNK) for w in weights]
        if chunk_counts != self._chunk_counts:
            numbers = torch.arange(len(weights), dtype=torch.int32).repeat_interleave(torch.tensor(chunk_counts))
            self._chunk_counts, self._numbers = chunk_counts, _upload(numbers, device)
            self._weight_squares, self._update_squares = torch.empty(
                2, len(numbers), dtype=torch.float64, device=device
            )
            self._infinite = torch.empty(len(numbers), dtype=torch.int32, device=device)
            self._steps = torch.empty(len(weights), device=device)
            self._skip = torch.empty((), dtype=torch.int32, device=device)
        # The options are a tensor and no arguments of the kernels: no value of them compiles a kernel anew.
        options = [
            (
                group["lr"],
                group["betas"][0],
                1 - group["betas"][0],
                group["betas"][1],
                1 - group["betas"][1],
                group["eps"],
                group["weight_decay"],
                group["trust_ratio"],
            )
            for group in distinct
        ]
        if options != self._options:
            self._options, self._option_table = options, _upload(torch.tensor(options, dtype=torch.float32), device)
        rows, first_chunk = [], 0
        places = {id(group): place for place, group in enumerate(distinct)}
        for w, g, m, v, copy, group, count in zip(
            weights, gradients, exp_avgs, exp_avg_sqs, copies, groups, chunk_counts
        ):
            rows.append(
                (
                    w.data_ptr(),
                    g.data_ptr(),
                    m.data_ptr(),
                    v.data_ptr(),
                    0 if copy is None else copy.data_ptr(),
                    w.numel(),
                    places[id(group)],
                    first_chunk,
                    count,
                )
            )
            first_chunk += count
        if rows != self._rows:
            self._rows, self._row_table = rows, _upload(torch.tensor(rows), device)
            self._aligned = all(address % 16 == 0 for row in rows for address in row[:5])
        tables = (self._row_table, self._option_table)
        sums = (self._weight_squares, self._update_squares, self._infinite)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _norms_kernel[(first_chunk,)](*tables, self._numbers, *sums, self._aligned, CHUNK, BLOCK, num_warps=8)
            _ratios_kernel[(len(rows) + 1,)](
                *tables, *sums, self._steps, self._skip, skipped, len(rows), first_chunk, REDUCED
            )
            _write_kernel[(first_chunk,)](
                *tables, self._numbers, self._steps, self._skip, self._aligned, CHUNK, BLOCK, num_warps=8
            )


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory, for which the host does not wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
