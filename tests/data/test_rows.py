import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import MLM, NSP, Part, RowShape, fill_unpacked, normalize_weights, unpacked_batch, unpad
from tests.make_samples import random_samples

SHAPES = st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(1, 8), st.sampled_from([50, 30522, 70000]))


def slow_batch(samples):
    """The batch format written down sample by sample."""
    (rows, length), masks = samples.input_ids.shape, samples.mlm_positions.shape[1]
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in RowShape.of(length, masks).layout(rows).items()}
    masked = sum(int(count) for count in samples.mlm_counts)
    for row in range(rows):
        for position in range(samples.lengths[row]):
            batch["input_ids"][row, position] = samples.input_ids[row, position]
            batch["token_type_ids"][row, position] = position >= samples.first_lengths[row]
            batch["position_ids"][row, position] = position
            batch["sample_ids"][row, position] = 1
        for slot in range(samples.mlm_counts[row]):
            batch["mlm_positions"][row, slot] = samples.mlm_positions[row, slot]
            batch["mlm_labels"][row, slot] = samples.mlm_labels[row, slot]
            batch["mlm_weights"][row, slot] = 1 / masked
        batch["nsp_labels"][row, 0] = samples.nsp_labels[row]
        batch["nsp_weights"][row, 0] = 1 / rows
    return batch


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@given(SHAPES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_a_batch_is_what_a_loop_over_samples_makes(shape, seed):
    samples = random_samples(np.random.default_rng(seed), *shape)
    assert_same(unpacked_batch(samples), slow_batch(samples))


@given(SHAPES, st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=40)
def test_a_batch_filled_in_pieces_is_the_same(shape, seed, data):
    samples = random_samples(np.random.default_rng(seed), *shape)
    cut = data.draw(st.integers(0, len(samples)))
    rows, length, masks = shape[:3]
    batch = {
        name: np.full(shape, 77, dtype) for name, (shape, dtype) in RowShape.of(length, masks).layout(rows).items()
    }
    for piece in (slice(cut, rows), slice(0, cut)):
        fill_unpacked({name: array[piece] for name, array in batch.items()}, samples.take(piece))
    assert normalize_weights(batch) == {"mlm_weights": int(samples.mlm_counts.sum()), "nsp_weights": rows}
    assert_same(batch, unpacked_batch(samples))


@given(SHAPES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_weights_sum_to_one(shape, seed):
    samples = random_samples(np.random.default_rng(seed), *shape)
    batch = unpacked_batch(samples)
    masked = int(samples.mlm_counts.sum())
    assert batch["mlm_weights"].sum(dtype=np.float64) == pytest.approx(min(1, masked), rel=1e-6)
    assert batch["nsp_weights"].sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)


@given(SHAPES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_samples_come_back_from_their_rows(shape, seed):
    samples = random_samples(np.random.default_rng(seed), *shape)
    batch = unpacked_batch(samples)
    np.testing.assert_array_equal(batch["input_ids"], samples.input_ids)
    np.testing.assert_array_equal(batch["sample_ids"].sum(axis=1), samples.lengths)
    np.testing.assert_array_equal((batch["sample_ids"] - batch["token_type_ids"]).sum(axis=1), samples.first_lengths)
    np.testing.assert_array_equal((batch["mlm_weights"] > 0).sum(axis=1), samples.mlm_counts)
    np.testing.assert_array_equal(batch["mlm_positions"], samples.mlm_positions)
    np.testing.assert_array_equal(batch["mlm_labels"], samples.mlm_labels)
    np.testing.assert_array_equal(batch["nsp_labels"][:, 0], samples.nsp_labels)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=5),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tokens_end_to_end_are_those_of_the_rows(rows, static, seed):
    length, slots, per_row = 28, 6, 4
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros(shape, dtype)
        for name, (shape, dtype) in RowShape(length, slots, per_row).layout(len(rows)).items()
    }
    samples = []  # of each its row, its tokens' slots
    for r, lengths in enumerate(rows):
        start = 0
        for s, n in enumerate(lengths):
            samples.append((r, range(start, start + n)))
            batch["sample_ids"][r, start : start + n] = s + 1
            batch["cls_positions"][r, s], batch["nsp_labels"][r, s], batch["nsp_weights"][r, s] = (
                start,
                rng.integers(2),
                rng.random() + 0.1,
            )
            start += n
        for name in ("input_ids", "token_type_ids", "position_ids"):
            batch[name][r, :start] = rng.integers(1, 99, start)
        used = rng.integers(0, slots) if start else 0
        batch["mlm_positions"][r, :used] = rng.integers(0, start, used) if start else 0
        batch["mlm_labels"][r, :used], batch["mlm_weights"][r, :used] = (
            rng.integers(1, 99, used),
            rng.random(used) + 0.1,
        )
    actual = unpad(batch, static)

    spans = [(a, b) for a, b in zip(actual["cu_seqlens"], actual["cu_seqlens"][1:])]
    assert actual["max_seqlen"] == length and actual["cu_seqlens"].dtype == np.int32
    if static:
        assert len(actual["input_ids"]) == len(rows) * length == spans[-1][1] and all(b > a for a, b in spans)
        spans = [(a, b) for a, b in spans if batch["sample_ids"].ravel()[a]]  # without padding
    else:
        assert len(actual["input_ids"]) == sum(len(slots) for _, slots in samples)
    assert len(spans) == len(samples)
    where = {}  # (row, slot) -> place
    for (a, b), (r, slots_of_sample) in zip(spans, samples):
        assert b - a == len(slots_of_sample)
        where.update(((r, slot), a + i) for i, slot in enumerate(slots_of_sample))
    for (r, slot), place in where.items():
        for name in ("input_ids", "token_type_ids", "position_ids"):
            assert actual[name][place] == batch[name][r, slot]
    for labels, positions, weights, _ in (MLM, NSP):
        expected = [
            (where[r, batch[positions][r, m]], batch[labels][r, m], batch[weights][r, m])
            for r, m in zip(*np.nonzero(batch[weights]))
        ]
        assert list(zip(actual[positions], actual[labels], actual[weights])) == expected
    assert unpad(batch, static, [MLM]).keys() == actual.keys() - set(NSP)


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 9))
def test_each_row_is_in_one_part_and_tokens_are_balanced_within_a_row(tokens, size):
    tokens = np.array(tokens, np.int64)
    parts = [Part(rank, size).rows(tokens) for rank in range(size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    assert all((np.diff(part) > 0).all() for part in parts)
    loads = [tokens[part].sum() for part in parts]
    assert max(loads) - min(loads) <= tokens.max(initial=0)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    batch = {"sample_ids": (np.arange(40) < tokens.reshape(-1, 1)).astype(np.int32)}
    shares = [Part(rank, size).of(batch)["sample_ids"] for rank in range(size)]
    assert all((share == batch["sample_ids"][part]).all() for share, part in zip(shares, parts))
