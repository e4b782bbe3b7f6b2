"""LAMB over all parameters at once in three Triton kernels (ops/lamb.py has the equations); the host never waits.

1. For each chunk of a parameter: the squares of the norms of weight and update, and whether a gradient is not finite.
   Writes nothing else.
2. For each parameter: learning rate * trust ratio, from its chunks in a fixed order; whether the update is skipped,
   and how often by now.
3. For each chunk: the update once more, and moments, weights and bfloat16 compute weights written.

That moves 44 bytes a parameter, 2 more for a compute weight: as many as reading the gradients alone first, with a
launch less. Where processes have parts of the parameters, 2 is two kernels, with the sum over the processes between
them. In the kernels w, g, m, v, u are the equations'.
"""

import contextlib
import itertools
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from triton.language import constexpr

__all__ = ["LambTriton"]

CHUNK = 4096  # elements that one program takes
# Of them at a time: one load of 16 bytes a thread and tensor, and few enough registers to have many in flight.
BLOCK = 1024
REDUCED = 1024  # chunks that are added up at a time

# Columns of the tables, which are small and on the device: a gradient may be at another address in each step.
WEIGHT, GRADIENT, EXP_AVG, EXP_AVG_SQ, COMPUTE_WEIGHT, SIZE, GROUP, FIRST_CHUNK, CHUNKS, PARAMETER_COLUMNS = map(
    constexpr, range(10)
)
LEARNING_RATE, BETA1, REST1, BETA2, REST2, EPS, WEIGHT_DECAY, TRUST_RATIO, GROUP_COLUMNS = map(constexpr, range(9))


@triton.jit
def _load(address, offsets, size, WHOLE: constexpr, ALIGNED: constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if WHOLE:  # a mask would make it a load for each value
        return tl.load(pointer + offsets)
    return tl.load(pointer + offsets, mask=offsets < size, other=0.0)


@triton.jit
def _store(address, offsets, values, size, WHOLE: constexpr, ALIGNED: constexpr):
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
    beta1, rest1 = tl.load(group + BETA1), tl.load(group + REST1)
    beta2, rest2 = tl.load(group + BETA2), tl.load(group + REST2)
    return beta1, rest1, beta2, rest2, tl.load(group + EPS), tl.load(group + WEIGHT_DECAY)


@triton.jit
def _update(tensors, options, offsets, size, WHOLE: constexpr, ALIGNED: constexpr):
    """Weight, gradient, new moments and update of some elements."""
    weight, gradient, exp_avg, exp_avg_sq = tensors
    beta1, rest1, beta2, rest2, eps, weight_decay = options
    w = _load(weight, offsets, size, WHOLE, ALIGNED)
    g = _load(gradient, offsets, size, WHOLE, ALIGNED)
    m = beta1 * _load(exp_avg, offsets, size, WHOLE, ALIGNED) + rest1 * g
    v = beta2 * _load(exp_avg_sq, offsets, size, WHOLE, ALIGNED) + (rest2 * g) * g
    return w, g, m, v, tl.div_rn(m, tl.sqrt_rn(v) + eps) + weight_decay * w


@triton.jit
def _norms(row, group, first, size, WHOLE: constexpr, ALIGNED: constexpr, CHUNK: constexpr, BLOCK: constexpr):
    tensors, options = _tensors(row), _options(group)
    # In double: the square of a float always fits.
    w_square, u_square = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, CHUNK, BLOCK):
        w, g, m, v, u = _update(tensors, options, first + begin + tl.arange(0, BLOCK), size, WHOLE, ALIGNED)
        infinite |= ((g.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        w, u = w.to(tl.float64), u.to(tl.float64)
        w_square += w * w
        u_square += u * u
    return tl.sum(w_square, axis=0), tl.sum(u_square, axis=0), tl.max(infinite, axis=0)


@triton.jit
def _norms_kernel(
    parameters, groups, numbers, w_squares, u_squares, infinite, ALIGNED: constexpr, CHUNK: constexpr, BLOCK: constexpr
):
    chunk = tl.program_id(0)
    row = parameters + tl.load(numbers + chunk) * PARAMETER_COLUMNS
    group = groups + tl.load(row + GROUP) * GROUP_COLUMNS
    size, first = tl.load(row + SIZE), (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    if first + CHUNK <= size:
        w_square, u_square, is_infinite = _norms(row, group, first, size, True, ALIGNED, CHUNK, BLOCK)
    else:
        w_square, u_square, is_infinite = _norms(row, group, first, size, False, ALIGNED, CHUNK, BLOCK)
    tl.store(w_squares + chunk, w_square)
    tl.store(u_squares + chunk, u_square)
    tl.store(infinite + chunk, is_infinite)


@triton.jit
def _squares(row, w_squares, u_squares, REDUCED: constexpr):
    """The squares of a parameter's norms, from its chunks."""
    lanes = tl.arange(0, REDUCED)
    first, own = tl.load(row + FIRST_CHUNK), tl.load(row + CHUNKS)
    w_square, u_square = tl.zeros([REDUCED], tl.float64), tl.zeros([REDUCED], tl.float64)
    begin = 0
    while begin < own:  # no range: Triton's interpreter, with NumPy 2.4, takes no loaded number as its end
        inside = begin + lanes < own
        w_square += tl.load(w_squares + first + begin + lanes, mask=inside, other=0.0)
        u_square += tl.load(u_squares + first + begin + lanes, mask=inside, other=0.0)
        begin += REDUCED
    return tl.sum(w_square, axis=0), tl.sum(u_square, axis=0)


@triton.jit
def _any(infinite, chunks, REDUCED: constexpr):
    lanes = tl.arange(0, REDUCED)
    is_infinite = tl.zeros([REDUCED], tl.int32)
    begin = 0
    while begin < chunks:
        is_infinite |= tl.load(infinite + begin + lanes, mask=begin + lanes < chunks, other=0)
        begin += REDUCED
    return tl.max(is_infinite, axis=0)


@triton.jit
def _step(group, w_square, u_square):
    w_norm, u_norm = tl.sqrt(w_square), tl.sqrt(u_square)
    has_ratio = (tl.load(group + TRUST_RATIO) != 0) & (w_norm > 0) & (u_norm > 0)
    ratio = tl.where(has_ratio, w_norm, 1.0) / tl.where(has_ratio, u_norm, 1.0)
    # Not infinite: infinity times an update of 0 would be NaN.
    return tl.minimum(tl.load(group + LEARNING_RATE).to(tl.float64) * ratio, 3.4028234e38).to(tl.float32)


@triton.jit
def _ratios_kernel(
    parameters, groups, w_squares, u_squares, infinite, steps, skip, skipped, count, chunks, REDUCED: constexpr
):
    number = tl.program_id(0)
    if number < count:
        row = parameters + number * PARAMETER_COLUMNS
        w_square, u_square = _squares(row, w_squares, u_squares, REDUCED)
        tl.store(steps + number, _step(groups + tl.load(row + GROUP) * GROUP_COLUMNS, w_square, u_square))
    else:  # one program more, for all of them
        any_infinite = _any(infinite, chunks, REDUCED)
        tl.store(skip, any_infinite)
        tl.store(skipped, tl.load(skipped) + any_infinite)


@triton.jit
def _sums_kernel(parameters, w_squares, u_squares, infinite, sums, count, chunks, REDUCED: constexpr):
    number = tl.program_id(0)
    if number < count:
        w_square, u_square = _squares(parameters + number * PARAMETER_COLUMNS, w_squares, u_squares, REDUCED)
        tl.store(sums + number, w_square)
        tl.store(sums + count + number, u_square)
    else:
        tl.store(sums + 2 * count, _any(infinite, chunks, REDUCED).to(tl.float64))


@triton.jit
def _steps_kernel(parameters, groups, sums, steps, skip, skipped, count):
    number = tl.program_id(0)
    if number < count:
        group = groups + tl.load(parameters + number * PARAMETER_COLUMNS + GROUP) * GROUP_COLUMNS
        tl.store(steps + number, _step(group, tl.load(sums + number), tl.load(sums + count + number)))
    else:
        any_infinite = (tl.load(sums + 2 * count) > 0).to(tl.int32)
        tl.store(skip, any_infinite)
        tl.store(skipped, tl.load(skipped) + any_infinite)


@triton.jit
def _write(row, group, step, first, size, WHOLE: constexpr, ALIGNED: constexpr, CHUNK: constexpr, BLOCK: constexpr):
    tensors, options, compute_weight = _tensors(row), _options(group), tl.load(row + COMPUTE_WEIGHT)
    weight, _, exp_avg, exp_avg_sq = tensors
    for begin in range(0, CHUNK, BLOCK):
        offsets = first + begin + tl.arange(0, BLOCK)
        w, g, m, v, u = _update(tensors, options, offsets, size, WHOLE, ALIGNED)
        w -= step * u
        _store(exp_avg, offsets, m, size, WHOLE, ALIGNED)
        _store(exp_avg_sq, offsets, v, size, WHOLE, ALIGNED)
        _store(weight, offsets, w, size, WHOLE, ALIGNED)
        if compute_weight != 0:
            # To nearest, ties to even, by hand: Triton's interpreter rounds ties away from zero.
            bits = w.to(tl.uint32, bitcast=True)
            rounded = tl.where(w == w, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
            _store(compute_weight, offsets, rounded.to(tl.uint16), size, WHOLE, ALIGNED)


@triton.jit
def _write_kernel(parameters, groups, numbers, steps, skip, ALIGNED: constexpr, CHUNK: constexpr, BLOCK: constexpr):
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

    def __init__(self) -> None:
        self._chunk_counts: Optional[List[int]] = None
        self._rows: Optional[List[Tuple]] = None
        self._options: Optional[List[Tuple]] = None

    def __call__(
        self,
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        compute_weights,
        groups: Sequence[Dict],
        skipped,
        sum_across: Optional[Callable[[torch.Tensor], None]] = None,
    ) -> None:
        device, tensors = skipped.device, (weights, gradients, exp_avgs, exp_avg_sqs, compute_weights)
        self._renew_tables(tensors, groups, device)
        tables, count, chunks = (self._row_table, self._option_table), len(weights), len(self._numbers)
        squares = (self._w_squares, self._u_squares, self._infinite)
        steps, sizes = (self._steps, self._skip), (self._aligned, CHUNK, BLOCK)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _norms_kernel[(chunks,)](*tables, self._numbers, *squares, *sizes, num_warps=8)
            if sum_across is None:
                _ratios_kernel[(count + 1,)](*tables, *squares, *steps, skipped, count, chunks, REDUCED)
            else:
                sums = torch.empty(2 * count + 1, dtype=torch.float64, device=device)
                _sums_kernel[(count + 1,)](self._row_table, *squares, sums, count, chunks, REDUCED)
                sum_across(sums)
                _steps_kernel[(count + 1,)](*tables, sums, *steps, skipped, count)
            _write_kernel[(chunks,)](*tables, self._numbers, *steps, *sizes, num_warps=8)

    def _renew_tables(self, tensors: Tuple[List, ...], groups: Sequence[Dict], device: torch.device) -> None:
        weights = tensors[0]
        chunk_counts = [-(-w.numel() // CHUNK) for w in weights]
        if chunk_counts != self._chunk_counts:
            repeats = torch.tensor(chunk_counts, dtype=torch.int64)
            numbers = torch.arange(len(weights), dtype=torch.int32).repeat_interleave(repeats)
            self._chunk_counts, self._numbers = chunk_counts, _upload(numbers, device)
            self._w_squares, self._u_squares = torch.empty(2, len(numbers), dtype=torch.float64, device=device)
            self._infinite = torch.empty(len(numbers), dtype=torch.int32, device=device)
            self._steps = torch.empty(len(weights), device=device)
            self._skip = torch.empty((), dtype=torch.int32, device=device)
        # The options are a tensor and no arguments of the kernels: no value of them compiles a kernel anew.
        distinct = {id(group): group for group in groups}
        options = [_option_row(group) for group in distinct.values()]
        if options != self._options:
            self._options, self._option_table = options, _upload(torch.tensor(options, dtype=torch.float32), device)
        places = {key: place for place, key in enumerate(distinct)}
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in tensors]
        group_column = [places[id(group)] for group in groups]
        first_chunks = [0, *itertools.accumulate(chunk_counts)]
        rows = list(zip(*addresses, [w.numel() for w in weights], group_column, first_chunks, chunk_counts))
        if rows != self._rows:
            self._rows, self._row_table = rows, _upload(torch.tensor(rows, dtype=torch.int64), device)
            self._aligned = all(address % 16 == 0 for column in addresses for address in column)


def _option_row(group: Dict) -> Tuple[float, ...]:
    beta1, beta2 = group["betas"]
    decay, ratio = group["weight_decay"], group["trust_ratio"]
    return group["lr"], beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], decay, ratio


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory, for which the host does not wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
