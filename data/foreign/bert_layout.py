"""BERT's own layout of samples, which NVIDIA's HDF5 and Google's TFRecord share, to the project's and back.

Shape letters: N samples, L sequence length, M mask slots.

    input_ids             [N, L]  masking applied
    input_mask            [N, L]  1 for a sample's tokens, then 0
    segment_ids           [N, L]  0 for the first segment, 1 for the second
    masked_lm_positions   [N, M]  padded with 0
    masked_lm_ids         [N, M]  what stood there, padded with 0
    masked_lm_weights     [N, M]  1 for a used slot, then 0; where it is missing, a slot is used when its masked_lm_ids
    is not 0
    next_sentence_labels  [N]     1 = the second segment does not follow
"""

from typing import Dict, Optional, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.samples import Samples, token_dtype

__all__ = ["BERT_FEATURES", "first_fault", "fit_samples", "from_samples", "to_samples"]

BERT_FEATURES = (
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "next_sentence_labels",
)
MOST_TOKENS = 65535  # lengths are uint16


def to_samples(arrays: Dict[str, np.ndarray], vocab_size: int, path: str, first: int = 0) -> Samples:
    """Samples from arrays in BERT's layout, of any integer types; what stands in the padding is dropped.

    Raises InputError that names the sample and what is wrong with it: ids beyond the vocabulary, a mask that is not
    ones and then zeros, segments that are not zeros and then ones, positions outside the sample or twice, other labels
    than 0 and 1. `path` and `first` (the index of the first sample in its file) are for the message.
    """
    count, sequence_length = arrays["input_ids"].shape
    mask_tokens = arrays["masked_lm_positions"].shape[1]
    check_shapes(arrays, count, sequence_length, mask_tokens, path)
    inside = arrays["input_mask"] == 1
    lengths = inside.sum(axis=1)
    second = (arrays["segment_ids"] == 1) & inside
    labels = arrays["masked_lm_ids"]
    used = arrays["masked_lm_weights"] > 0 if "masked_lm_weights" in arrays else labels != 0
    # Used slots first and ascending: makers sort them, the format does not ask for it.
    order = np.argsort(np.where(used, arrays["masked_lm_positions"], sequence_length), axis=1, kind="stable")
    positions = np.take_along_axis(arrays["masked_lm_positions"], order, axis=1)
    labels = np.take_along_axis(labels, order, axis=1)
    used = np.take_along_axis(used, order, axis=1)
    words = f"0 to {vocab_size - 1}: is the vocabulary the one that the samples were made with?"
    segments = "zeros for the first segment, then ones"
    stop_if_any(
        path,
        first,
        [
            ("input_ids", arrays["input_ids"], words, within(arrays["input_ids"], vocab_size)),
            ("masked_lm_ids", arrays["masked_lm_ids"], words, within(arrays["masked_lm_ids"], vocab_size)),
            (
                "input_mask",
                arrays["input_mask"],
                "ones for the sample's tokens, then zeros",
                (arrays["input_mask"] == (np.arange(sequence_length) < lengths[:, None])) & (lengths > 0)[:, None],
            ),
            ("segment_ids", arrays["segment_ids"], segments, ~inside | within(arrays["segment_ids"], 2)),
            ("segment_ids", arrays["segment_ids"][:, 1:], segments, ~(second[:, :-1] & inside[:, 1:] & ~second[:, 1:])),
            (
                "next_sentence_labels",
                arrays["next_sentence_labels"],
                "0 or 1",
                within(arrays["next_sentence_labels"], 2),
            ),
            (
                "masked_lm_positions",
                positions,
                "a place in the sample",
                ~used | (positions >= 0) & (positions < lengths[:, None]),
            ),
            (
                "masked_lm_positions",
                positions[:, 1:],
                "each place once",
                ~used[:, 1:] | (positions[:, :-1] != positions[:, 1:]),
            ),
        ],
    )
    ids, small = token_dtype(vocab_size), np.uint16
    return Samples(
        input_ids=(arrays["input_ids"] * inside).astype(ids),
        lengths=lengths.astype(small),
        first_lengths=(lengths - second.sum(axis=1)).astype(small),
        mlm_positions=(positions * used).astype(small),
        mlm_labels=(labels * used).astype(ids),
        mlm_counts=used.sum(axis=1).astype(small),
        nsp_labels=arrays["next_sentence_labels"].astype(np.uint8),
    )


def from_samples(samples: Samples, path: str, first: int = 0) -> Dict[str, np.ndarray]:
    """Arrays in BERT's layout, in the types of NVIDIA's files: int32 ids and positions, int8 for the rest.

    Raises InputError that names a sample with the label 0, which that layout takes for an unused slot.
    """
    slots, positions = np.arange(samples.mlm_positions.shape[1]), np.arange(samples.input_ids.shape[1])
    used = slots < samples.mlm_counts[:, None]
    stop_if_any(
        path,
        first,
        [
            (
                "mlm_labels",
                samples.mlm_labels,
                "another id: BERT's layout takes 0 for an unused slot",
                ~used | (samples.mlm_labels != 0),
            )
        ],
    )
    inside = positions < samples.lengths[:, None]
    return {
        "input_ids": samples.input_ids.astype(np.int32),
        "input_mask": inside.astype(np.int8),
        "segment_ids": (inside & (positions >= samples.first_lengths[:, None])).astype(np.int8),
        "masked_lm_positions": samples.mlm_positions.astype(np.int32),
        "masked_lm_ids": samples.mlm_labels.astype(np.int32),
        "next_sentence_labels": samples.nsp_labels.astype(np.int8),
    }


def fit_samples(samples: Samples, sequence_length: int, mask_tokens: int, path: str, first: int = 0) -> Samples:
    """The same samples with room for `sequence_length` tokens and `mask_tokens` masked ones.

    Raises InputError that names a sample that is longer or has more masked tokens.
    """
    stop_if_any(
        path,
        first,
        [
            (
                "lengths",
                samples.lengths,
                f"at most --sequence-length {sequence_length}",
                samples.lengths <= sequence_length,
            ),
            (
                "mlm_counts",
                samples.mlm_counts,
                f"at most --mask-tokens {mask_tokens}",
                samples.mlm_counts <= mask_tokens,
            ),
        ],
    )
    return Samples(
        resized(samples.input_ids, sequence_length),
        samples.lengths,
        samples.first_lengths,
        resized(samples.mlm_positions, mask_tokens),
        resized(samples.mlm_labels, mask_tokens),
        samples.mlm_counts,
        samples.nsp_labels,
    )


def resized(values: np.ndarray, width: int) -> np.ndarray:
    if values.shape[1] >= width:
        return values[:, :width]
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def check_shapes(arrays: Dict[str, np.ndarray], count: int, sequence_length: int, mask_tokens: int, path: str) -> None:
    if not 1 <= sequence_length <= MOST_TOKENS:
        raise InputError(f"{path}: input_ids has {sequence_length} tokens a sample, expected 1 to {MOST_TOKENS}")
    tokens, masks = (count, sequence_length), (count, mask_tokens)
    for name, shape in [
        ("input_mask", tokens),
        ("segment_ids", tokens),
        ("masked_lm_ids", masks),
        ("masked_lm_weights", masks),
        ("next_sentence_labels", (count,)),
    ]:
        if name in arrays and arrays[name].shape != shape:
            raise InputError(
                f"{path}: {name} has the shape {arrays[name].shape}, expected {shape} to go with input_ids "
                "and masked_lm_positions"
            )


def within(values: np.ndarray, end: int) -> np.ndarray:
    return (values >= 0) & (values < end)


def stop_if_any(path: str, first: int, checks: Sequence[tuple]) -> None:
    fault = first_fault(checks)
    if fault is not None:
        raise InputError(f"{path}: sample {first + fault[0]}: {fault[1]}")


def first_fault(checks: Sequence[tuple]) -> Optional[Tuple[int, str]]:
    """The first of N samples that fails a check, and what is wrong with it; None when all are good.

    A check is (name, values [N] or [N, any], what is expected, which values are good, booleans of the same shape).
    """
    good = np.array([fine if fine.ndim == 1 else fine.all(axis=1) for _, _, _, fine in checks])
    if good.all():
        return None
    bad = int(np.argmin(good.all(axis=0)))
    name, values, expected, fine = checks[int(np.argmin(good[:, bad]))]
    value = values[bad] if fine.ndim == 1 else values[bad, int(np.argmin(fine[bad]))]
    return bad, f"{name} holds {value}, expected {expected}"
