"""The search for the largest micro-batch that fits."""

import numpy as np
import pytest
import torch

from bert.engines.micro_batch import full_rows, largest_that_fits
from data.rows import RowShape, unpad


@pytest.mark.parametrize(
    "available, most, expected",
    [(10**6, 64, 64), (5000, 64, 45), (5000, 20, 20), (630, 64, 1), (5000, 8, 8), (1200, 8, 7), (0, 64, 0)],
)
def test_the_largest_number_of_rows_that_fits_is_found(available, most, expected):
    assert largest_that_fits(lambda rows: 500 + 100 * rows, available, most) == expected


def test_where_memory_grows_faster_than_two_tries_foretell_rows_are_cut_until_they_fit():
    tried = []

    def peak_of(rows):
        tried.append(rows)
        if rows > 60:
            raise torch.OutOfMemoryError("out of memory")
        return 500 + 100 * rows + (1000 if rows > 50 else 0)

    rows = largest_that_fits(peak_of, 6500, 1000)
    assert rows == 45 and peak_of(rows) <= 6500 and len(tried) < 12


@pytest.mark.parametrize("limit", [1, 4, 20, 31, 100])
def test_running_out_of_memory_in_any_try_makes_fewer_rows(limit):
    def peak_of(rows):
        if rows > limit:
            raise torch.OutOfMemoryError("out of memory")
        return 100 * rows

    assert limit // 2 < largest_that_fits(peak_of, 10**6, 1024) <= limit


def test_full_rows_use_every_slot():
    batch = full_rows(3, RowShape(20, 7, 6))
    assert (batch["sample_ids"] > 0).all() and set(batch["sample_ids"].ravel()) == {1, 2, 3, 4, 5, 6}
    rows = np.arange(3)[:, None]
    assert (batch["sample_ids"][rows, batch["cls_positions"]] == [[1, 2, 3, 4, 5, 6]] * 3).all()
    tokens = unpad(batch, static=True)
    assert len(tokens["input_ids"]) == 60 and len(tokens["mlm_labels"]) == 21 and len(tokens["cu_seqlens"]) == 3 * 7 + 1
