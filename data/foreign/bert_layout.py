"""BERT's own layout of samples, which NVIDIA's HDF5 and Google's TFRecord share, to the project's and back.

Shape letters: N samples, L sequence length, M mask slots.

    input_ids             [N, L]  masking applied
    input_mask            [N, L]  1 for a sample's tokens, then 0
    segment_ids           [N, L]  0 for the first segment, 1 for the second
    masked_lm_positions   [N, M]  padded with 0
    masked_lm_ids         [N, M]  what stood there, padded with 0
    masked_lm_weights     [N, M]  1 for a used slot, then 0; without it, a slot is used when its masked_lm_ids is not 0
    next_sentence_labels  [N]     1 = the second segment does not follow
"""

from dataclasses import replace
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from data.errors import InputError
from data.samples import Samples, token_dtype

__all__ = ["BERT_FEATURES", "Check", "check_shapes", "first_fault", "fit_samples", "from_samples", "to_samples"]

TOKEN_FEATURES = ("input_ids", "input_mask", "segment_ids")
MASK_FEATURES = ("masked_lm_positions", "masked_lm_ids")
BERT_FEATURES = (*TOKEN_FEATURES, *MASK_FEATURES, "next_sentence_labels")
MOST_TOKENS = 65535  # lengths are uint16

Check = Tuple[str, np.ndarray, str, np.ndarray]
"""(name, values [N] or [N, any], what is expected, which values are good, booleans of the same shape)"""


def to_samples(arrays: Dict[str, np.ndarray], vocab_size: int, path: str, first: int = 0) -> Samples:
    """Samples from arrays in BERT's layout, of any integer types; what stands in the padding is dropped.

    Raises InputError that names the first bad sample: ids beyond the vocabulary, a mask that is not ones and then
    zeros, segments that are not zeros and then ones, positions outside the sample or twice, other labels than 0 and 1.
    `path` and `first` (the index of the first sample in its file) are for the message.
    """
    check_shapes(arrays, path)
    ids, mask, segments, _, labels, nsp_labels = (arrays[name] for name in BERT_FEATURES)
    inside, length = mask == 1, ids.shape[1]
    lengths = inside.sum(axis=1)
    second = (segments == 1) & inside
    # Used slots first and ascending: makers sort them, the format does not ask for it.
    used = arrays["masked_lm_weights"] > 0 if "masked_lm_weights" in arrays else labels != 0
    order = np.argsort(np.where(used, arrays["masked_lm_positions"], length), axis=1, kind="stable")
    positions, labels, used = (
        np.take_along_axis(values, order, axis=1) for values in (arrays["masked_lm_positions"], labels, used)
    )
    known = f"0 to {vocab_size - 1}: is the vocabulary the one that the samples were made with?"
    two_segments = "zeros for the first segment, then ones"
    ones = (mask == (np.arange(length) < lengths[:, None])) & (lengths > 0)[:, None]
    falling = second[:, :-1] & inside[:, 1:] & ~second[:, 1:]
    differ = positions[:, :-1] != positions[:, 1:]
    stop_at_fault(
        [
            ("input_ids", ids, known, in_range(ids, vocab_size)),
            ("masked_lm_ids", labels, known, in_range(labels, vocab_size)),
            ("input_mask", mask, "ones for the sample's tokens, then zeros", ones),
            ("segment_ids", segments, two_segments, ~inside | in_range(segments, 2)),
            ("segment_ids", segments[:, 1:], two_segments, ~falling),
            ("next_sentence_labels", nsp_labels, "0 or 1", in_range(nsp_labels, 2)),
            ("masked_lm_positions", positions, "a place in the sample", ~used | in_range(positions, lengths[:, None])),
            ("masked_lm_positions", positions[:, 1:], "each place once", ~used[:, 1:] | differ),
        ],
        path,
        first,
    )
    token, small = token_dtype(vocab_size), np.uint16
    return Samples(
        input_ids=(ids * inside).astype(token),
        lengths=lengths.astype(small),
        first_lengths=(lengths - second.sum(axis=1)).astype(small),
        mlm_positions=(positions * used).astype(small),
        mlm_labels=(labels * used).astype(token),
        mlm_counts=used.sum(axis=1).astype(small),
        nsp_labels=nsp_labels.astype(np.uint8),
    )


def from_samples(samples: Samples, path: str, first: int = 0) -> Dict[str, np.ndarray]:
    """Arrays in BERT's layout, in the types of NVIDIA's files: int32 ids and positions, int8 for the rest.

    Raises InputError that names a sample with the label 0, which that layout takes for an unused slot.
    """
    labels, position = samples.mlm_labels, np.arange(samples.input_ids.shape[1])
    unused = np.arange(labels.shape[1]) >= samples.mlm_counts[:, None]
    expected = "another id: BERT's layout takes 0 for an unused slot"
    stop_at_fault([("mlm_labels", labels, expected, unused | (labels != 0))], path, first)
    inside = position < samples.lengths[:, None]
    return {
        "input_ids": samples.input_ids.astype(np.int32),
        "input_mask": inside.astype(np.int8),
        "segment_ids": (inside & (position >= samples.first_lengths[:, None])).astype(np.int8),
        "masked_lm_positions": samples.mlm_positions.astype(np.int32),
        "masked_lm_ids": labels.astype(np.int32),
        "next_sentence_labels": samples.nsp_labels.astype(np.int8),
    }


def fit_samples(samples: Samples, sequence_length: int, mask_tokens: int, path: str, first: int = 0) -> Samples:
    """The same samples with room for `sequence_length` tokens and `mask_tokens` masked ones.

    Raises InputError that names a sample that is longer or has more masked tokens.
    """
    lengths, counts = samples.lengths, samples.mlm_counts
    checks: Sequence[Check] = [
        ("lengths", lengths, f"at most --sequence-length {sequence_length}", lengths <= sequence_length),
        ("mlm_counts", counts, f"at most --mask-tokens {mask_tokens}", counts <= mask_tokens),
    ]
    stop_at_fault(checks, path, first)
    return replace(
        samples,
        input_ids=resized(samples.input_ids, sequence_length),
        mlm_positions=resized(samples.mlm_positions, mask_tokens),
        mlm_labels=resized(samples.mlm_labels, mask_tokens),
    )


def resized(values: np.ndarray, width: int) -> np.ndarray:
    missing = max(0, width - values.shape[1])
    return np.pad(values, ((0, 0), (0, missing))) if missing else values[:, :width]


def check_shapes(arrays: Mapping[str, Any], path: str) -> None:
    """Raises InputError for arrays or HDF5 data sets whose shapes are not those of one number of samples."""
    tokens, masks = arrays["input_ids"].shape, arrays["masked_lm_positions"].shape
    if len(tokens) != 2 or not 1 <= tokens[1] <= MOST_TOKENS:
        raise InputError(f"{path}: input_ids has the shape {tokens}, expected [N, L] with L from 1 to {MOST_TOKENS}")
    expected = dict.fromkeys((*MASK_FEATURES, "masked_lm_weights"), (tokens[0], *masks[-1:]))
    expected.update(dict.fromkeys(TOKEN_FEATURES, tokens), next_sentence_labels=tokens[:1])
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            expected_shape = f"{shape} to go with input_ids {tokens} and masked_lm_positions {masks}"
            raise InputError(f"{path}: {name} has the shape {arrays[name].shape}, expected {expected_shape}")


def in_range(values: np.ndarray, end: Union[int, np.ndarray]) -> np.ndarray:
    return (values >= 0) & (values < end)


def stop_at_fault(checks: Sequence[Check], path: str, first: int) -> None:
    fault = first_fault(checks)
    if fault is not None:
        raise InputError(f"{path}: sample {first + fault[0]}: {fault[1]}")


def first_fault(checks: Sequence[Check]) -> Optional[Tuple[int, str]]:
    """The first of N samples that fails a check, and what is wrong with it; None when all are good."""
    faults = []
    for name, values, expected, good in checks:
        if not good.all():
            place = np.unravel_index(int(np.argmin(good)), good.shape)
            faults.append((int(place[0]), f"{name} holds {values[place]}, expected {expected}"))
    return min(faults, key=lambda fault: fault[0], default=None)
