"""Samples in memory: N of them as arrays.

    input_ids      [N, L] V        [CLS] first segment [SEP] second segment [SEP], then zeros
    lengths        [N]    uint16   tokens in all
    first_lengths  [N]    uint16   tokens of the first segment, its [CLS] and [SEP] among them
    mlm_positions  [N, M] uint16   where tokens were masked, ascending; zeros after the last
    mlm_labels     [N, M] V        what stood there
    mlm_counts     [N]    uint16   masked tokens
    nsp_labels     [N]    uint8    1 = the second segment does not follow the first, as in BERT's own data

V is uint16 for a vocabulary of up to 65,536 tokens, else uint32. Masking is applied, but where the loader masks anew.
"""

from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple, Union

import numpy as np

from data.errors import InputError

__all__ = ["FIELDS", "Samples", "check_samples", "find_bad_sample", "layout", "token_dtype"]


@dataclass
class Samples:
    """N samples as arrays, laid out as in a shard (the module's docstring has shapes and types)."""

    input_ids: np.ndarray
    lengths: np.ndarray
    first_lengths: np.ndarray
    mlm_positions: np.ndarray
    mlm_labels: np.ndarray
    mlm_counts: np.ndarray
    nsp_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, index: Union[slice, np.ndarray]) -> "Samples":
        """The samples at `index`, in that order: views for a slice, copies for an integer array."""
        if isinstance(index, slice):
            return Samples(*[getattr(self, name)[index] for name in FIELDS])
        return Samples(*[np.take(getattr(self, name), index, axis=0) for name in FIELDS])

    @staticmethod
    def empty(count: int, sequence_length: int, mask_tokens: int, vocab_size: int) -> "Samples":
        """Room for `count` samples, uninitialised."""
        arrays = layout(sequence_length, mask_tokens, vocab_size)
        return Samples(**{name: np.empty((count, *shape), dtype) for name, (shape, dtype) in arrays.items()})

    @staticmethod
    def concatenate(parts: Sequence["Samples"]) -> "Samples":
        return Samples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


FIELDS = tuple(Samples.__dataclass_fields__)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def layout(sequence_length: int, mask_tokens: int, vocab_size: int) -> Dict[str, Tuple[tuple, np.dtype]]:
    """Name -> (shape of one sample, type) of each dataset of a shard."""
    ids, small = token_dtype(vocab_size), np.dtype(np.uint16)
    return {
        "input_ids": ((sequence_length,), ids),
        "lengths": ((), small),
        "first_lengths": ((), small),
        "mlm_positions": ((mask_tokens,), small),
        "mlm_labels": ((mask_tokens,), ids),
        "mlm_counts": ((), small),
        "nsp_labels": ((), np.dtype(np.uint8)),
    }


def check_samples(samples: Samples, vocab_size: int, path: str, first: int = 0) -> None:
    """Raises InputError that names the first bad sample: ids beyond the vocabulary, lengths or positions beyond it.

    `path` and `first` (the index of the first sample in its file) are for the message.
    """
    bad = find_bad_sample(samples, vocab_size)
    if bad is not None:
        raise InputError(f"{path}: sample {first + bad[0]}: {bad[1]}")


def find_bad_sample(samples: Samples, vocab_size: int) -> Optional[Tuple[int, str]]:
    """The index of the first bad sample and what is wrong with it, or None when all are good."""
    (_, sequence_length), (_, mask_tokens) = samples.input_ids.shape, samples.mlm_positions.shape
    lengths = samples.lengths
    checks = [
        ("input_ids", f"below the vocabulary's {vocab_size}", samples.input_ids < vocab_size),
        ("mlm_labels", f"below the vocabulary's {vocab_size}", samples.mlm_labels < vocab_size),
        ("lengths", f"1 to {sequence_length} tokens", (lengths >= 1) & (lengths <= sequence_length)),
        ("first_lengths", "at most the sample's length", samples.first_lengths <= lengths),
        ("mlm_counts", f"at most {mask_tokens}", samples.mlm_counts <= mask_tokens),
        # Those of unused slots too: they are zero, and the graph gathers at them all the same.
        ("mlm_positions", "below the sample's length", samples.mlm_positions < lengths[:, None]),
        ("nsp_labels", "0 or 1", samples.nsp_labels <= 1),
    ]
    faults = []
    for name, expected, good in checks:
        if not good.all():
            place = np.unravel_index(int(np.argmin(good)), good.shape)
            value, slot = getattr(samples, name)[place], "".join(f"[{index}]" for index in place[1:])
            faults.append((int(place[0]), f"{name}{slot} is {value}, expected {expected}"))
    return min(faults, key=lambda fault: fault[0], default=None)
