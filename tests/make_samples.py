"""Random samples and shards for tests: valid, of all lengths, cheap to make."""

import os
from typing import List, Sequence

import numpy as np

from data.samples import Samples, token_dtype
from data.shards import write_shard

__all__ = ["WORDS", "bert_samples", "random_samples", "write_random_shards"]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{number}" for number in range(5, 100)]


def random_samples(
    rng: np.random.Generator, count: int, sequence_length: int = 16, mask_tokens: int = 4, vocab_size: int = 100
) -> Samples:
    """`count` valid samples: 2 to sequence_length tokens, 0 to mask_tokens of them masked, words from 1 on, zeros as
    padding."""
    ids, small = token_dtype(vocab_size), np.uint16
    lengths = rng.integers(2, sequence_length + 1, count)
    counts = np.minimum(rng.integers(0, mask_tokens + 1, count), lengths)
    inside = np.arange(sequence_length) < lengths[:, None]
    used = np.arange(mask_tokens) < counts[:, None]
    # The first of a shuffle of each sample's positions, then in ascending order.
    slots = np.arange(max(sequence_length, mask_tokens))
    keys = np.where(slots < lengths[:, None], rng.random((count, len(slots))), 2.0)
    shuffled = np.argsort(keys, axis=1)[:, :mask_tokens]
    positions = np.sort(np.where(used, shuffled, sequence_length), axis=1)
    return Samples(
        input_ids=(rng.integers(1, vocab_size, (count, sequence_length)) * inside).astype(ids),
        lengths=lengths.astype(small),
        first_lengths=rng.integers(1, lengths + 1).astype(small),
        mlm_positions=(positions * used).astype(small),
        mlm_labels=(rng.integers(1, vocab_size, (count, mask_tokens)) * used).astype(ids),
        mlm_counts=counts.astype(small),
        nsp_labels=rng.integers(0, 2, count).astype(np.uint8),
    )


def write_random_shards(
    folder: str,
    sizes: Sequence[int],
    seed: int = 0,
    sequence_length: int = 16,
    mask_tokens: int = 4,
    vocab_size: int = 100,
) -> List[str]:
    """One shard of random samples for each size, in `folder`; returns their paths, sorted."""
    rng, paths = np.random.default_rng(seed), []
    for index, size in enumerate(sizes):
        paths.append(os.path.join(str(folder), f"shard-{index:04}.hdf5"))
        write_shard(
            paths[-1],
            random_samples(rng, size, sequence_length, mask_tokens, vocab_size),
            vocab_size,
            "0" * 64,
            {"random": seed},
        )
    return paths


def bert_samples(rng: np.random.Generator, count: int, sequence_length: int = 16, mask_tokens: int = 4) -> Samples:
    """`count` samples over WORDS as BERT's are: [CLS], words, [SEP], words, [SEP], some masked 80/10/10; 5 tokens or
    more."""
    samples = Samples.empty(count, sequence_length, mask_tokens, len(WORDS))
    for name in vars(samples):
        getattr(samples, name)[:] = 0
    for i in range(count):
        length = int(rng.integers(5, sequence_length + 1))
        first = int(rng.integers(3, length - 1))
        ids = rng.integers(5, len(WORDS), length)
        ids[[0, first - 1, length - 1]] = 2, 3, 3
        places = np.setdiff1d(np.arange(length), [0, first - 1, length - 1])
        places = np.sort(rng.permutation(places)[: rng.integers(0, mask_tokens + 1)])
        samples.lengths[i], samples.first_lengths[i], samples.mlm_counts[i] = length, first, len(places)
        samples.mlm_positions[i, : len(places)], samples.mlm_labels[i, : len(places)] = places, ids[places]
        dice = rng.random(len(places))
        ids[places] = np.where(
            dice < 0.8, 4, np.where(dice < 0.9, rng.integers(5, len(WORDS), len(places)), ids[places])
        )
        samples.input_ids[i, :length] = ids
        samples.nsp_labels[i] = rng.integers(0, 2)
    return samples
