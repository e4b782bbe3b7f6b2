"""Random samples and shards of a given length distribution: what the benchmarks run on where no data set is named.

A distribution is "full" (all samples as long as can be), a mean length (evenly spread around it), or "wikipedia".
"""

import os

import numpy as np

from data.samples import Samples, token_dtype
from data.shards import write_shard
from data.tokenizer import SPECIAL_TOKENS, Vocabulary, vocab_sha256, write_tokenizer_files

__all__ = ["length_distribution", "random_samples", "write_data_set"]

SHORTEST = 5  # [CLS], a token, [SEP], a token, [SEP]
SAMPLES_OF_SHARD = 262144


def length_distribution(text):
    """The value of a --lengths option: "full", "wikipedia" or a mean."""
    return text if text in ("full", "wikipedia") else int(text)


def draw_lengths(distribution, count, longest, rng):
    """[count] lengths of 5 to `longest` tokens.

    "wikipedia" is a model of English Wikipedia's samples: BERT aims a tenth of them at a random length; beyond 128
    tokens most of the others end with their document, log-normal, so that at 512 half of all slots is padding (as arXiv
    2107.02027 found) and 22 % of the samples are full. Up to 128, documents are taken to be longer than a sample: 95 %
    of the slots are filled, no easy case.
    """
    if distribution == "full":
        return np.full(count, longest, np.uint16)
    if distribution == "wikipedia":
        lengths = np.where(rng.random(count) < 0.1, rng.integers(SHORTEST, longest + 1, count), longest)
        if longest > 128:
            lengths = np.minimum(lengths, rng.lognormal(np.log(225), 1.2, count))
        return np.maximum(lengths, SHORTEST).astype(np.uint16)
    if not SHORTEST <= distribution <= longest:
        raise ValueError(f"a mean length of {distribution}, expected {SHORTEST} to {longest}")
    spread = min(distribution - SHORTEST, longest - distribution)
    return rng.integers(distribution - spread, distribution + spread + 1, count).astype(np.uint16)


def random_samples(distribution, count, longest, mask_tokens, vocab_size, rng):
    """`count` samples of random tokens, 15 % of them masked."""
    lengths = draw_lengths(distribution, count, longest, rng)
    counts = np.clip(np.round(0.15 * lengths), 1, mask_tokens).astype(np.uint16)
    inside, used = np.arange(longest) < lengths[:, None], np.arange(mask_tokens) < counts[:, None]
    positions = 1 + np.arange(mask_tokens) * (lengths // (counts + 1))[:, None]
    first_id, ids = min(1000, vocab_size // 2), token_dtype(vocab_size)
    return Samples(
        rng.integers(first_id, vocab_size, (count, longest), dtype=ids) * inside,
        lengths,
        lengths // 2,
        (positions * used).astype(np.uint16),
        rng.integers(first_id, vocab_size, (count, mask_tokens), dtype=ids) * used,
        counts,
        rng.integers(0, 2, count, dtype=np.uint8),
    )


def write_data_set(folder, distribution, count, longest, mask_tokens, vocab_size):
    """Shards of random samples and their vocabulary, for a run; returns the pattern of the shards."""
    rng = np.random.default_rng(0)
    tokens = list(SPECIAL_TOKENS) + [f"word{number}" for number in range(len(SPECIAL_TOKENS), vocab_size)]
    write_tokenizer_files(folder, Vocabulary(tokens))
    for number, first in enumerate(range(0, count, SAMPLES_OF_SHARD)):
        in_shard = min(SAMPLES_OF_SHARD, count - first)
        samples = random_samples(distribution, in_shard, longest, mask_tokens, vocab_size, rng)
        path = os.path.join(folder, f"train-{number:05}.h5")
        write_shard(path, samples, vocab_size, vocab_sha256(tokens), {"random": 0})
    return os.path.join(folder, "train-*.h5")
