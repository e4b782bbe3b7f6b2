"""Packing: which samples share a row.

Best fit on the histogram of lengths (Krell et al., arXiv 2107.02027, with best fit in place of shortest pack first):
samples of one length are alike, so it is lengths that are placed, not samples, longest first, each in the open row with
the least room for it.

Shape letters: N samples, L token slots of a row, M mask slots of a row, S samples of a row at most.
"""

from typing import Dict, List, NamedTuple, Tuple

import numpy as np

__all__ = ["SAMPLES_PER_ROW", "Packing", "largest_prefix", "one_a_row", "pack"]

SAMPLES_PER_ROW = 6  # S when nothing else is asked for


class Packing(NamedTuple):
    """Where each of N samples is. Rows are in the order of their first samples; the samples of a row, longest first."""

    rows: int  # how many
    row: np.ndarray  # [N] int64: the row of each sample
    place: np.ndarray  # [N] int64: which of the row's samples it is, 0 to S-1
    start: np.ndarray  # [N] int64: the token slot at which it begins
    mask_start: np.ndarray  # [N] int64: the mask slot at which its masked tokens begin

    def take(self, index: np.ndarray) -> "Packing":
        """Of the samples at `index` alone, in that order; the rows are the same."""
        return Packing(self.rows, *(field[index] for field in self[1:]))


def pack(
    lengths: np.ndarray, mask_counts: np.ndarray, sequence_length: int, mask_slots: int, samples_per_row: int
) -> Packing:
    """Packs N samples of `lengths` [N] with `mask_counts` [N] masked tokens into rows of L, M and S slots.

    A sample that fits no row alone is the caller's error: lengths are 1 to L, counts 0 to M.
    """
    # Stable, longest first: samples of one length are neighbours, in their own order.
    order = np.argsort(-lengths.astype(np.int32), kind="stable")
    histogram = np.bincount(lengths, minlength=sequence_length + 1)
    first_of_length = np.cumsum(histogram[::-1])[::-1] - histogram  # in `order`
    shapes = row_shapes(histogram, samples_per_row)
    grid = np.full((sum(count for _, count in shapes), samples_per_row), -1)
    row = 0
    for shape, count in shapes:
        for place, length in enumerate(shape):
            first = first_of_length[length]
            grid[row : row + count, place] = order[first : first + count]
            first_of_length[length] += count
        row += count
    return packing_of(grid, lengths, mask_counts, mask_slots)


def one_a_row(count: int) -> Packing:
    """No packing: each of `count` samples in a row of its own."""
    zeros = np.zeros(count, np.int64)
    return Packing(count, np.arange(count), zeros, zeros, zeros)


def row_shapes(histogram: np.ndarray, samples_per_row: int) -> List[Tuple[Tuple[int, ...], int]]:
    """The lengths in a row, longest first, and how many rows are so, for all samples of a histogram of lengths."""
    longest = len(histogram) - 1
    # open_rows[room]: shapes of rows with that much room that may take another sample, and how many rows have each.
    open_rows: List[Dict[Tuple[int, ...], int]] = [{} for _ in range(longest + 1)]
    full = []
    for length in range(longest, 0, -1):
        left = int(histogram[length])
        if not left:
            continue
        taken = []
        for room in range(length, longest + 1):
            shapes = open_rows[room]
            while shapes and left:
                shape, available = shapes.popitem()
                count = min(left, available)
                if available > count:
                    shapes[shape] = available - count
                taken.append((shape + (length,), room - length, count))
                left -= count
            if not left:
                break
        while left:
            # New rows hold as many of this length as fit.
            each = min(max(1, longest // length), samples_per_row, left)
            count = left // each
            taken.append(((length,) * each, longest - each * length, count))
            left -= each * count
        for shape, room, count in taken:
            if room == 0 or len(shape) == samples_per_row:
                full.append((shape, count))
            else:
                open_rows[room][shape] = open_rows[room].get(shape, 0) + count
    return full + [item for shapes in open_rows for item in shapes.items()]


def packing_of(grid: np.ndarray, lengths: np.ndarray, mask_counts: np.ndarray, mask_slots: int) -> Packing:
    """The packing of rows that hold the samples of `grid` [rows, S], -1 where there is none.

    The last samples of a row with too many masked tokens get rows of their own.
    """
    lengths, mask_counts = np.append(lengths, 0), np.append(mask_counts, 0)  # int64, and 0 at -1
    over = (grid >= 0) & (np.cumsum(mask_counts[grid], axis=1) > mask_slots)
    if over.any():
        alone = np.full((int(over.sum()), grid.shape[1]), -1)
        alone[:, 0], grid[over] = grid[over], -1
        grid = np.concatenate([grid, alone])
    grid = grid[np.argsort(np.where(grid < 0, len(lengths), grid).min(axis=1), kind="stable")]
    row, place = np.nonzero(grid >= 0)
    starts, mask_starts = [
        (np.cumsum(sizes[grid], axis=1) - sizes[grid])[row, place] for sizes in (lengths, mask_counts)
    ]
    sample_order = np.empty_like(row)
    sample_order[grid[row, place]] = np.arange(len(row))
    return Packing(len(grid), row, place, starts, mask_starts).take(sample_order)


def largest_prefix(
    lengths: np.ndarray, mask_counts: np.ndarray, rows: int, sequence_length: int, mask_slots: int, samples_per_row: int
) -> Packing:
    """Packs about as many of the first samples as fit `rows` rows, for static shapes."""
    tokens = np.cumsum(lengths[: rows * samples_per_row], dtype=np.int64)
    count = int(np.searchsorted(tokens, rows * sequence_length, side="right"))
    while True:
        packing = pack(lengths[:count], mask_counts[:count], sequence_length, mask_slots, samples_per_row)
        if packing.rows <= rows:
            return packing
        count -= max(1, (packing.rows - rows) * count // packing.rows)
