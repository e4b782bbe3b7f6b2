import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.loading import order as order_module
from data.loading.order import BLOCK, WINDOW_TOKENS, Order

SIZES = st.lists(st.integers(0, 700), min_size=1, max_size=5).filter(sum)


def numbers(order, sizes, samples_seen, count):
    """The plain reading of an order: the numbers, in file order, of the `count` samples that follow `samples_seen`."""
    firsts, actual = np.cumsum([0] + list(sizes)), []
    for window in order.windows(samples_seen):
        members = np.concatenate([firsts[shard] + np.arange(start, stop) for shard, start, stop in window.blocks])
        actual.extend(members[window.rows].tolist())
        if len(actual) >= count:
            return actual[:count]


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    patch = pytest.MonkeyPatch()
    patch.setattr(order_module, "BLOCK", 16)
    patch.setattr(order_module, "WINDOW_TOKENS", 16 * 64)
    yield
    patch.undo()


@given(SIZES, st.integers(0, 2**40), st.sampled_from([1, 8, 5000]), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_each_epoch_is_a_permutation_of_all_samples(sizes, seed, sequence_length, epoch):
    total = sum(sizes)
    actual = numbers(Order(sizes, seed, sequence_length), sizes, epoch * total, total)
    assert sorted(actual) == list(range(total))


@given(SIZES, st.integers(0, 2**40), st.data())
@settings(deadline=None, max_examples=50)
def test_the_order_does_not_depend_on_where_it_was_cut(sizes, seed, data):
    total = sum(sizes)
    whole = numbers(Order(sizes, seed, 8), sizes, 0, 3 * total)
    start = data.draw(st.integers(0, 3 * total - 1))
    stop = data.draw(st.integers(start + 1, 3 * total))
    assert numbers(Order(sizes, seed, 8), sizes, start, stop - start) == whole[start:stop]


@given(SIZES)
@settings(deadline=None, max_examples=50)
def test_windows_hold_every_block_once_and_fit_the_buffer(sizes):
    order, total, seen, blocks = Order(sizes, 3, 8), sum(sizes), 0, []
    for window in order.windows():
        counts = window.blocks[:, 2] - window.blocks[:, 1]
        assert sorted(window.rows) == list(range(counts.sum()))
        assert counts.sum() <= order.window_samples and counts.max() <= 16
        blocks.extend(map(tuple, window.blocks.tolist()))
        seen += len(window.rows)
        if seen >= total:
            break
    expected = {
        (shard, start, min(start + 16, size)) for shard, size in enumerate(sizes) for start in range(0, size, 16)
    }
    assert seen == total and set(blocks) == expected and len(blocks) == len(expected)


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes = [300, 200]
    first, second = (numbers(Order(sizes, 0, 8), sizes, epoch * 500, 500) for epoch in range(2))
    other = numbers(Order(sizes, 1, 8), sizes, 0, 500)
    assert first != second and first != other and second != other


def test_the_order_stays_the_same_from_version_to_version():
    assert numbers(Order([30, 20], 1234, 8), [30, 20], 45, 10) == [23, 33, 21, 28, 38, 48, 47, 10, 18, 35]


def test_neighbours_on_disk_are_not_neighbours_in_the_order():
    actual = np.array(numbers(Order([5000, 5000], 0, 8), [5000, 5000], 0, 10000))
    assert np.mean(np.abs(np.diff(actual)) < 16) < 0.15
    assert abs(np.corrcoef(actual, np.arange(10000))[0, 1]) < 0.2


def test_windows_are_of_equal_size():
    # 17 blocks at most 8 to a window: 5 or 6 each, rather than 8, 8 and 1.
    order = Order([17 * 16], 0, 8)
    lengths = [len(window.blocks) for window in itertools.islice(order.windows(), 3)]
    assert sorted(lengths) == [5, 6, 6]


@pytest.mark.parametrize("length, samples", [(128, 1048576), (512, 262144)])
def test_38_million_samples_are_resumed_anywhere_at_once(monkeypatch, length, samples):
    monkeypatch.setattr(order_module, "BLOCK", BLOCK)
    monkeypatch.setattr(order_module, "WINDOW_TOKENS", WINDOW_TOKENS)
    began = time.monotonic()
    order = Order([19001] * 2000, 0, length)
    window = next(order.windows(7 * order.num_samples + 30123456))
    assert time.monotonic() - began < 1
    assert 0 < len(window.rows) <= order.window_samples <= samples


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="seed is -1"):
        Order([10], -1, 8)
    with pytest.raises(InputError, match="no samples"):
        Order([0, 0], 0, 8)
    with pytest.raises(InputError, match="samples_seen is -5"):
        next(Order([10], 0, 8).windows(-5))
