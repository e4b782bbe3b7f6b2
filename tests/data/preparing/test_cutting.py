import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.masking import Masking, choose_tokens
from data.preparing.cutting import Chunk, assemble, cut_pairs, cut_single, make_samples
from data.preparing.options import PrepareOptions
from data.samples import check_samples

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{number}" for number in range(500)]
CLS, SEP = 2, 3


def chunk_of(documents, seed=0):
    """A chunk of documents given as lists of unit lengths, with random ids of words."""
    units = np.array([unit for document in documents for unit in document])
    sizes = [sum(document) for document in documents]
    tokens = np.random.default_rng(seed).integers(5, len(WORDS), units.sum()).astype(np.uint16)
    return Chunk(tokens, np.cumsum(units) - units, np.cumsum([0] + sizes))


def long_documents(count=40, units=60, seed=1):
    return chunk_of(np.random.default_rng(seed).integers(1, 60, (count, units)).tolist())


def segments(chunk, cuts):
    """For each sample (its first segment's span, its second's, its label)."""
    firsts = zip(cuts.first_starts.tolist(), (cuts.first_starts + cuts.first_lengths).tolist())
    seconds = zip(cuts.second_starts.tolist(), (cuts.second_starts + cuts.second_lengths).tolist())
    return list(zip(firsts, seconds, cuts.nsp_labels.tolist()))


chunks = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=8).map(chunk_of)


@given(chunks, st.integers(8, 40), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 1000))
def test_every_token_is_exactly_once_in_a_first_segment_or_in_a_second_that_follows_it(
    chunk, sequence_length, short, seed
):
    cuts, dropped = cut_pairs(chunk, sequence_length, short, np.random.default_rng(seed))
    covered = [
        span for first, second, label in segments(chunk, cuts) for span in ([first] if label else [first, second])
    ]
    walked = [token for begin, end in covered for token in range(begin, end)]
    assert walked == list(range(len(chunk.tokens) - dropped))
    assert dropped == (1 if len(chunk.tokens) == 1 else 0)


@given(chunks, st.integers(8, 40), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 1000))
def test_segments_are_within_one_document_fit_and_follow_or_come_from_another_as_the_label_says(
    chunk, length, short, seed
):
    cuts, _ = cut_pairs(chunk, length, short, np.random.default_rng(seed))
    for first, second, label in segments(chunk, cuts):
        assert first[0] < first[1] and second[0] < second[1]
        assert first[1] - first[0] + second[1] - second[0] <= length - 3
        documents = [
            set(np.searchsorted(chunk.document_starts, [begin, end - 1], side="right") - 1)
            for begin, end in (first, second)
        ]
        assert len(documents[0]) == len(documents[1]) == 1
        if label:
            assert documents[0] != documents[1]
        else:
            assert second[0] == first[1] and documents[0] == documents[1]


def test_windows_are_full_and_cut_at_a_lines_end_where_they_have_one():
    chunk = chunk_of([[10] * 200, [10] * 200])
    cuts, _ = cut_pairs(chunk, 128, 0.0, np.random.default_rng(0))
    assert (cuts.first_lengths + cuts.second_lengths == 125).mean() > 0.9
    ends = cuts.first_starts + cuts.first_lengths
    begins_full = cuts.first_lengths + cuts.second_lengths == 125
    assert np.isin(ends[begins_full], np.concatenate([chunk.unit_starts, chunk.document_starts])).all()


def test_short_share_says_how_many_samples_are_cut_shorter():
    for share in (0.0, 0.1, 0.5):
        cuts, _ = cut_pairs(long_documents(200), 64, share, np.random.default_rng(0))
        short = (cuts.first_lengths + cuts.second_lengths < 61).mean()
        assert share * 0.9 - 0.01 < short < share + 0.05


def test_half_of_the_second_segments_do_not_follow():
    assert abs(cut_pairs(long_documents(200), 64, 0.1, np.random.default_rng(0))[0].nsp_labels.mean() - 0.5) < 0.02
    tiny = chunk_of([[30]] * 4000)
    assert abs(cut_pairs(tiny, 64, 0.1, np.random.default_rng(0))[0].nsp_labels.mean() - 0.5) < 0.03


def test_neither_lengths_nor_line_starts_tell_the_label():
    chunk = long_documents(300)
    cuts, _ = cut_pairs(chunk, 64, 0.1, np.random.default_rng(0))
    totals = cuts.first_lengths + cuts.second_lengths
    at_unit = np.isin(cuts.second_starts, chunk.unit_starts)
    random = cuts.nsp_labels == 1
    assert abs(totals[random].mean() - totals[~random].mean()) < 0.5
    assert abs(at_unit[random].mean() - at_unit[~random].mean()) < 0.02


def test_one_document_gives_only_pairs_that_follow_and_loses_nothing():
    cuts, dropped = cut_pairs(chunk_of([[1] * 300]), 16, 0.3, np.random.default_rng(0))
    assert dropped == 0 and not cuts.nsp_labels.any()


def test_a_document_of_one_token_is_paired_with_another_or_counted_as_dropped():
    cuts, dropped = cut_pairs(chunk_of([[1], [20]]), 16, 0.0, np.random.default_rng(0))
    assert dropped == 0 and (cuts.first_lengths[0], cuts.nsp_labels[0]) == (1, 1)
    cuts, dropped = cut_pairs(chunk_of([[1]]), 16, 0.0, np.random.default_rng(0))
    assert dropped == 1 and len(cuts.nsp_labels) == 0


def cut_one_by_one(chunk, sequence_length, short_share, seed):
    """What `cut_single` does, window by window: (start, length) of each."""
    rng, longest, windows = np.random.default_rng(seed), sequence_length - 2, []
    bounds = chunk.document_starts.tolist()
    count = sum(-(-(end - start) // 2) for start, end in zip(bounds, bounds[1:]))
    short, lengths = rng.random(count) < short_share, rng.integers(2, longest + 1, count)
    for start, end in zip(bounds, bounds[1:]):
        while start < end:
            target = lengths[len(windows)] if short[len(windows)] else longest
            windows.append((start, min(int(target), end - start)))
            start += windows[-1][1]
    return windows


@given(chunks, st.integers(8, 40), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 1000))
def test_samples_of_one_segment_hold_every_token_once_and_none_of_another_document(chunk, length, short, seed):
    cuts = cut_single(chunk, length, short, np.random.default_rng(seed))
    spans = list(zip(cuts.first_starts.tolist(), cuts.first_lengths.tolist()))
    assert spans == cut_one_by_one(chunk, length, short, seed)
    walked = [token for start, size in spans for token in range(start, start + size)]
    assert walked == list(range(len(chunk.tokens))) and max(cuts.first_lengths) <= length - 2
    inner = [bound for start, size in spans for bound in chunk.document_starts if start < bound < start + size]
    assert not inner and not cuts.second_lengths.any() and not cuts.nsp_labels.any()


def test_short_share_says_how_many_samples_of_one_segment_are_cut_shorter():
    for share in (0.0, 0.1, 0.5):
        cuts = cut_single(long_documents(200), 64, share, np.random.default_rng(0))
        assert share * 0.9 - 0.01 < (cuts.first_lengths < 62).mean() < share + 0.05


def test_samples_of_one_segment_are_cls_text_sep_and_zeros():
    chunk = chunk_of([[9, 7], [12], [40], [1]])
    cuts = cut_single(chunk, 24, 0.5, np.random.default_rng(3))
    input_ids, lengths = assemble(chunk.tokens, cuts, 24, CLS, SEP)
    for row, length, start, size in zip(input_ids.tolist(), lengths, cuts.first_starts, cuts.first_lengths):
        expected = [CLS] + chunk.tokens[start : start + size].tolist() + [SEP]
        assert length == size + 2 and row == expected + [0] * (24 - length)


def test_samples_are_cls_first_sep_second_sep_and_zeros():
    chunk = chunk_of([[9, 7], [12], [40]])
    cuts, _ = cut_pairs(chunk, 24, 0.5, np.random.default_rng(3))
    input_ids, lengths = assemble(chunk.tokens, cuts, 24, CLS, SEP)
    for row, length, (first, second, _) in zip(input_ids.tolist(), lengths.tolist(), segments(chunk, cuts)):
        expected = [CLS] + chunk.tokens[slice(*first)].tolist() + [SEP] + chunk.tokens[slice(*second)].tolist() + [SEP]
        assert length == len(expected) and row == expected + [0] * (24 - length)


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("sequence_length, mask_tokens", [(128, 20), (512, 76)])
def test_samples_are_the_same_for_the_same_seed_and_fit_the_shard_format(sequence_length, mask_tokens, nsp):
    options = PrepareOptions([], "", sequence_length=sequence_length, mask_tokens=mask_tokens, nsp=nsp)
    random_tokens = Masking.of(choose_tokens, 0.15, len(WORDS), range(5))

    def made(seed, masking=random_tokens):
        blocks, dropped = make_samples(long_documents(300), range(5), masking, options, np.random.default_rng(seed))
        assert dropped == 0
        return list(blocks)

    first, again, other = made([1, 2]), made([1, 2]), made([1, 3])
    for name in vars(first[0]):
        assert all((getattr(a, name) == getattr(b, name)).all() for a, b in zip(first, again))
    assert (first[0].input_ids[:100] != other[0].input_ids[:100]).any()
    for samples in first:
        check_samples(samples, len(WORDS), "made here")
        assert samples.input_ids.dtype == samples.mlm_labels.dtype == np.uint16 and samples.nsp_labels.dtype == np.uint8
        assert nsp or (samples.first_lengths == samples.lengths).all() and not samples.nsp_labels.any()
    unmasked = made([1, 2], masking=None)[0]
    check_samples(unmasked, len(WORDS), "made here")
    assert not unmasked.mlm_counts.any() and (unmasked.lengths == first[0].lengths).all()
