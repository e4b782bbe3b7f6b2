"""Packing: every sample in one place, no slot twice, rows full; packed rows hold what unpacked ones do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import largest_prefix, pack
from data.rows import RowShape, fill_packed, unpacked_batch
from tests.make_samples import random_samples


def check_packing(packing, lengths, counts, sequence_length, mask_slots, samples_per_row):
    assert len(packing.row) == len(lengths) and set(packing.row.tolist()) == set(range(packing.rows))
    first_seen = [int(np.argmax(packing.row == row)) for row in range(packing.rows)]
    assert first_seen == sorted(first_seen)
    for row in range(packing.rows):
        members = np.flatnonzero(packing.row == row)
        members = members[np.argsort(packing.place[members])]
        assert packing.place[members].tolist() == list(range(len(members))) and len(members) <= samples_per_row
        assert packing.start[members].tolist() == np.concatenate([[0], np.cumsum(lengths[members])[:-1]]).tolist()
        assert packing.mask_start[members].tolist() == np.concatenate([[0], np.cumsum(counts[members])[:-1]]).tolist()
        assert lengths[members].sum() <= sequence_length and counts[members].sum() <= mask_slots


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_sample_has_one_place_and_no_limit_is_broken(data):
    sequence_length = data.draw(st.integers(4, 40))
    mask_slots = data.draw(st.integers(1, 12))
    samples_per_row = data.draw(st.integers(1, 5))
    lengths = np.array(data.draw(st.lists(st.integers(1, sequence_length), max_size=60)), np.uint16)
    counts = np.array([data.draw(st.integers(0, min(mask_slots, int(length)))) for length in lengths], np.uint16)
    check_packing(
        pack(lengths, counts, sequence_length, mask_slots, samples_per_row),
        lengths,
        counts,
        sequence_length,
        mask_slots,
        samples_per_row,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4))
def test_a_prefix_for_fixed_rows_fits_and_is_never_empty(seed, rows, samples_per_row):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, rows * samples_per_row).astype(np.uint16)
    counts = np.minimum(lengths, 4)
    packing = largest_prefix(lengths, counts, rows, 32, 7, samples_per_row)
    count = len(packing.row)
    assert packing.rows <= rows <= count or count == len(lengths)
    check_packing(packing, lengths[:count], counts[:count], 32, 7, samples_per_row)


@pytest.mark.parametrize("length, mask_tokens, full", [(128, 20, 0.75), (512, 76, 0.05)])
def test_rows_are_at_least_97_percent_full_on_lengths_like_wikipedias(length, mask_tokens, full):
    # At 128 most samples are full; at 512 about half of all slots would be padding.
    rng = np.random.default_rng()
    count = 2**23 // length
    lengths = np.where(rng.random(count) < full, length, rng.integers(5, length + 1, count)).astype(np.uint16)
    counts = np.maximum(1, np.minimum(mask_tokens, np.round(0.15 * lengths))).astype(np.uint16)
    shape = RowShape.of(length, mask_tokens, 6)
    packing = pack(lengths, counts, *shape)
    assert lengths.sum() / (packing.rows * length) > 0.97
    packing = largest_prefix(lengths, counts, count // 4, *shape)
    assert lengths[: len(packing.row)].sum() / (count // 4 * length) > 0.97


def samples_of(batch):
    """Every sample of a batch as plain values, whatever row it is in."""
    samples = []
    for r in range(len(batch["input_ids"])):
        for s in np.flatnonzero(batch["nsp_weights"][r]):
            inside = batch["sample_ids"][r] == s + 1
            start = batch["cls_positions"][r, s]
            assert np.flatnonzero(inside).tolist() == list(range(start, start + inside.sum()))
            assert batch["position_ids"][r, inside].tolist() == list(range(inside.sum()))
            masks = [
                (int(p - start), int(label), float(w))
                for p, label, w in zip(batch["mlm_positions"][r], batch["mlm_labels"][r], batch["mlm_weights"][r])
                if w and inside[p]
            ]
            samples.append(
                (
                    batch["input_ids"][r, inside].tolist(),
                    batch["token_type_ids"][r, inside].tolist(),
                    masks,
                    int(batch["nsp_labels"][r, s]),
                    float(batch["nsp_weights"][r, s]),
                )
            )
        outside = batch["sample_ids"][r] == 0
        for name in ("input_ids", "token_type_ids", "position_ids"):
            assert not batch[name][r, outside].any(), name
        unused = batch["mlm_weights"][r] == 0
        assert not batch["mlm_positions"][r, unused].any() and not batch["mlm_labels"][r, unused].any()
    return sorted(samples)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 4))
def test_packed_rows_hold_the_samples_of_unpacked_ones(seed, count, samples_per_row):
    samples = random_samples(np.random.default_rng(seed), count, 32, 5, 90)
    shape = RowShape.of(32, 5, samples_per_row)
    packing = pack(samples.lengths, samples.mlm_counts, *shape)
    # What is there must all be written over.
    batch = {name: np.full(size, 77, dtype) for name, (size, dtype) in shape.layout(packing.rows).items()}
    order = np.lexsort((packing.place, packing.row))
    fill_packed(batch, samples.take(order), packing.take(order))
    plain = unpacked_batch(samples)
    for name in ("mlm_weights", "nsp_weights"):
        plain[name] = (plain[name] > 0).astype(np.float32)
    assert samples_of(batch) == samples_of(plain)
