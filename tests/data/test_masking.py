import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.masking import (
    CHOICES,
    Masking,
    choice_reference,
    choose_tokens,
    choose_words,
    load_choice,
    mask,
    mask_budget,
    mask_dynamic,
    random_32,
    sample_keys,
)
from data.samples import FIELDS, Samples

VOCAB = 500
SPECIAL = (0, 1, 2, 3, 4)
CLS, SEP, MASK = SPECIAL[2:]
CONTINUES = np.arange(VOCAB) % 3 == 0
CONTINUES[:5] = False


def clean_samples(rng, count, sequence_length=64, mask_tokens=10, full=False):
    lengths = np.full(count, sequence_length) if full else rng.integers(5, sequence_length + 1, count)
    firsts = np.full(count, sequence_length // 2) if full else rng.integers(3, lengths - 1)
    position = np.arange(sequence_length)
    ids = rng.integers(5, VOCAB, (count, sequence_length)).astype(np.uint16)
    ids[position >= lengths[:, None]] = 0
    ids[:, 0], ids[position == firsts[:, None] - 1], ids[position == lengths[:, None] - 1] = CLS, SEP, SEP
    return Samples(
        ids,
        lengths.astype(np.uint16),
        firsts.astype(np.uint16),
        np.zeros((count, mask_tokens), np.uint16),
        np.zeros((count, mask_tokens), np.uint16),
        np.zeros(count, np.uint16),
        np.zeros(count, np.uint8),
    )


def masked(samples, indices=None, seed=1, epoch=0, share=0.15, continues=None):
    indices = np.arange(len(samples)) if indices is None else indices
    choose = choose_tokens if continues is None else choose_words
    return mask_dynamic(samples, indices, seed, epoch, Masking.of(choose, share, VOCAB, SPECIAL, continues))


def same(samples, others):
    return all((getattr(samples, name) == getattr(others, name)).all() for name in FIELDS)


def test_samples_of_one_segment_have_a_token_more_to_mask():
    # [CLS] a [SEP], [CLS] a [SEP] b [SEP], [CLS] [SEP], [CLS] a b c [SEP], [CLS] a b [SEP] c [SEP]
    lengths, first_lengths = np.array([3, 5, 2, 5, 6], np.uint16), np.array([3, 3, 2, 5, 4], np.uint16)
    assert mask_budget(lengths, first_lengths, 0.9, 10).tolist() == [1, 2, 0, 3, 3]
    assert mask_budget(lengths, first_lengths, 0.1, 10).tolist() == [1, 1, 0, 1, 1]
    assert mask_budget(lengths, first_lengths, 0.9, 2).tolist() == [1, 2, 0, 2, 2]


@pytest.mark.parametrize("continues", [None, CONTINUES])
def test_samples_of_one_segment_are_masked_up_to_their_budget(continues):
    samples = clean_samples(np.random.default_rng(0), 300, 12, 10)
    samples.input_ids[np.arange(300), samples.first_lengths - 1] = 5
    samples.first_lengths[:] = samples.lengths
    counts = masked(samples, share=0.9, continues=continues).mlm_counts
    assert (counts == np.minimum(samples.lengths - 2, np.rint(0.9 * samples.lengths))).all()


@given(
    st.sampled_from([(8, 5), (16, 3), (32, 20), (33, 1)]),
    st.sampled_from([0.05, 0.15, 0.9]),
    st.booleans(),
    st.integers(0, 99),
)
def test_putting_the_labels_back_gives_the_unmasked_ids(sizes, share, whole_words, seed):
    sequence_length, mask_tokens = sizes
    before = clean_samples(np.random.default_rng(seed), 30, sequence_length, mask_tokens)
    after = masked(before, share=share, seed=seed, continues=CONTINUES if whole_words else None)
    restored = after.input_ids.copy()
    for row, count in enumerate(after.mlm_counts):
        used, length = after.mlm_positions[row, :count].astype(int), int(before.lengths[row])
        budget = min(mask_tokens, length - 3, max(1, round(share * length)))
        assert count <= budget if whole_words else count == budget
        assert (np.diff(used) > 0).all() and not np.isin(used, [0, before.first_lengths[row] - 1, length - 1]).any()
        assert not after.mlm_positions[row, count:].any() and not after.mlm_labels[row, count:].any()
        restored[row, used] = after.mlm_labels[row, :count]
    assert (restored == before.input_ids).all() and not before.mlm_counts.any()


@pytest.mark.parametrize("continues", [None, CONTINUES])
def test_a_samples_mask_depends_on_seed_epoch_and_index_and_on_nothing_else(continues):
    samples = clean_samples(np.random.default_rng(0), 1500)
    whole = masked(samples, continues=continues)
    assert same(whole, masked(samples, continues=continues))
    order = np.random.default_rng(1).permutation(1500)[:700]
    assert same(whole.take(order), masked(samples.take(order), order, continues=continues))
    assert same(whole.take(slice(7, 8)), masked(samples.take(slice(7, 8)), np.array([7]), continues=continues))
    for other in (dict(epoch=1), dict(seed=2), dict(indices=np.arange(1500) + 10**9)):
        changed = masked(samples, continues=continues, **other)
        assert (changed.mlm_positions != whole.mlm_positions).any(axis=1).mean() > 0.9


def test_masked_tokens_are_80_percent_mask_10_percent_random_words_and_10_percent_unchanged():
    samples = clean_samples(np.random.default_rng(0), 20000, full=True)
    samples.input_ids[:, 1:31], samples.input_ids[:, 32:63] = 100, 100
    for epoch in range(2):
        after = masked(samples, epoch=epoch)
        assert (after.mlm_counts == 10).all() and (after.mlm_labels == 100).all()
        now = np.take_along_axis(after.input_ids, after.mlm_positions.astype(int), axis=1)
        assert abs((now == MASK).mean() - 0.8) < 0.01
        assert abs((now == 100).mean() - 0.1) < 0.01
        others = now[(now != MASK) & (now != 100)]
        assert others.min() == 5 and others.max() == VOCAB - 1 and len(np.unique(others)) == VOCAB - 6
        chosen = np.bincount(after.mlm_positions.ravel(), minlength=64)
        free = np.delete(chosen, [0, 31, 63])
        assert chosen[[0, 31, 63]].sum() == 0 and free.min() > 0.9 * free.mean() and free.max() < 1.1 * free.mean()


def test_whole_words_are_masked_together_and_fill_the_budget():
    samples = clean_samples(np.random.default_rng(0), 3000, full=True)
    after = masked(samples, continues=CONTINUES)
    chosen = np.zeros(samples.input_ids.shape, bool)
    for row, count in enumerate(after.mlm_counts):
        chosen[row, after.mlm_positions[row, :count]] = True
    inner = CONTINUES[samples.input_ids]
    inner[:, [1, 32]] = False  # what follows [CLS] and [SEP] begins a word
    assert (chosen[:, 1:] == chosen[:, :-1])[inner[:, 1:]].all()
    assert after.mlm_counts.mean() > 9.9
    free = np.delete(chosen.mean(axis=0), [0, 31, 63])
    assert free.std() / free.mean() < 0.1


def test_whole_words_that_do_not_fit_leave_a_sample_unmasked():
    samples = clean_samples(np.random.default_rng(0), 1, 8, 1, full=True)
    samples.input_ids[0] = [CLS, 5, 6, SEP, 5, 6, 6, SEP]
    assert masked(samples, share=0.1, continues=CONTINUES).mlm_counts.tolist() == [0]


def test_random_bits_are_even_and_keys_are_told_apart_by_either_half():
    bits = random_32(np.arange(1000, dtype=np.uint64)[:, None] << np.uint64(32), np.arange(128, dtype=np.uint32))
    assert len(np.unique(bits)) > 0.9999 * bits.size
    assert np.abs(np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(axis=0) - 0.5).max() < 0.01
    assert len(np.unique(sample_keys(3, 4, np.arange(100000)))) == 100000
    assert not np.isin(sample_keys(3, 4, np.arange(1000)), sample_keys(4, 3, np.arange(1000))).any()


def test_masking_in_place_keeps_the_types_of_a_shard():
    samples = clean_samples(np.random.default_rng(0), 10)
    mask(samples, np.arange(10, dtype=np.uint64), Masking.of(choose_tokens, 0.15, VOCAB, SPECIAL))
    types = (samples.mlm_positions.dtype, samples.mlm_labels.dtype, samples.mlm_counts.dtype)
    assert types == (np.uint16,) * 3 and (samples.input_ids == MASK).any()


def choose_all(candidates):
    rows, positions = np.nonzero(~candidates.special)
    return rows, positions


def test_choosing_beyond_the_budget_is_an_error():
    with pytest.raises(ValueError, match="choose_all chose more tokens of a sample than its budget"):
        mask_dynamic(
            clean_samples(np.random.default_rng(0), 2, full=True),
            np.arange(2),
            1,
            0,
            Masking.of(choose_all, 0.15, VOCAB, SPECIAL),
        )


def test_a_choice_is_named_by_its_module_and_an_unknown_one_is_refused(monkeypatch):
    assert load_choice(choice_reference("words")) is choose_words
    monkeypatch.setitem(CHOICES, "all", choose_all)
    assert choice_reference("all") == "tests.data.test_masking:choose_all"
    assert load_choice(choice_reference("all")) is choose_all
    with pytest.raises(InputError, match="--masked-units: 'spans' .* expected tokens or words or all"):
        choice_reference("spans")
    # In the program itself: `python -m` knows its module, `python` with a path does not.
    monkeypatch.setattr(choose_all, "__module__", "__main__")
    for spec in (ModuleSpec("tests.data.test_masking", None), None):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        if spec:
            assert load_choice(choice_reference("all")) is choose_all
    with pytest.raises(InputError, match="choose_all is defined in the program itself"):
        choice_reference("all")
