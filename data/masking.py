"""Masking of tokens as BERT does it, by `data.prepare` once or by the loader anew in each epoch.

Shape letters: N samples, L sequence length, M mask slots, V vocabulary.

A sample's randomness comes from a key of its own and nothing else: each number is a hash of (key, counter). So a sample
is masked the same way whatever else is in its batch, and on any number of threads. NumPy does the work and lets go of
Python's lock in it.

After BERT (arXiv 1810.04805, section 3.1); whole words as in its program's create_masked_lm_predictions.
"""

from dataclasses import dataclass, replace
from typing import Optional, Sequence, Tuple

import numpy as np

from data.samples import Samples, token_dtype
from data.shards import ShardInfo

__all__ = ["MaskWords", "mask", "mask_budget", "mask_dynamic", "mask_words_of", "sample_keys"]

BLOCK = 1024  # samples masked at a time: their temporaries stay in the cache
GOLDEN = 0x9E3779B97F4A7C15
ALL_ONES = 0xFFFFFFFF
# Counters of a sample's random numbers: its positions first, then the dice and the random word of each position.
DICE, RANDOM_WORD = 1 << 16, 2 << 16
EIGHT_TENTHS, NINE_TENTHS = np.uint32(0.8 * 2**32), np.uint32(0.9 * 2**32)


@dataclass(frozen=True)
class MaskWords:
    """What masking has to know of a vocabulary."""

    mask_id: int
    random_ids: np.ndarray
    """the ids that may stand for a masked token: all but the special ones, in the type of a shard's ids"""
    continues: Optional[np.ndarray] = None
    """[V] bool, whether an id goes on a word (`##`): whole words are masked; None: tokens are masked singly"""

    @staticmethod
    def of(vocab_size: int, special_ids: Sequence[int], continues: Optional[np.ndarray] = None) -> "MaskWords":
        """`special_ids`: of [PAD], [UNK], [CLS], [SEP] and [MASK], in this order."""
        random_ids = np.delete(np.arange(vocab_size), list(special_ids)).astype(token_dtype(vocab_size))
        return MaskWords(int(special_ids[4]), random_ids, continues)


def mask_words_of(shard: ShardInfo) -> MaskWords:
    """What the shards of a data set with dynamic masking say of their vocabulary."""
    continues = None
    if shard.continuations:
        bits = np.frombuffer(bytes.fromhex(shard.continuations), np.uint8)
        continues = np.unpackbits(bits)[: shard.vocab_size].astype(bool)
    return MaskWords.of(shard.vocab_size, shard.special_ids, continues)


def mask_dynamic(
    samples: Samples, sample_indices: np.ndarray, seed: int, epoch, words: MaskWords, mask_share: float
) -> Samples:
    """Unmasked samples, masked for one epoch: a pure function of each sample, its index, the seed and the epoch.

    `sample_indices` [N] integers: the samples' places in the data set, counted through its shards. `epoch`: one, or
    each's. The given samples are left as they are; those returned share all arrays with them but `input_ids` and the
    three of `mlm_`.
    """
    input_ids = samples.input_ids.copy()
    positions, labels, counts = mask(
        input_ids,
        samples.lengths,
        samples.first_lengths,
        sample_keys(seed, epoch, sample_indices),
        samples.mlm_positions.shape[1],
        mask_share,
        words,
    )
    return replace(samples, input_ids=input_ids, mlm_positions=positions, mlm_labels=labels, mlm_counts=counts)


def sample_keys(seed: int, epoch, sample_indices: np.ndarray) -> np.ndarray:
    """A random key for each sample, [N] uint64, from the seed, the epoch and its index."""
    run = np.array([seed], np.uint64)
    for number in (epoch, None):
        run = mixed_64(run + np.uint64(GOLDEN))
        run = run if number is None else run ^ np.atleast_1d(number).astype(np.uint64)
    return mixed_64(run + np.asarray(sample_indices).astype(np.uint64) * np.uint64(GOLDEN))


def mixed_64(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_32(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """32 random bits for each key (uint64) and counter (uint32), which broadcast: both halves of the key go into the
    hash.

    The hash is lowbias32 (Wellons, "Prospecting for hash functions"), whose rounds are cheap in 32-bit lanes.
    """
    state = counters * np.uint32(GOLDEN >> 32) + keys.astype(np.uint32)
    shifted = state >> np.uint32(16)
    for multiplier, shift, high in (
        (0x7FEB352D, 15, (keys >> np.uint64(32)).astype(np.uint32)),
        (0x846CA68B, 16, None),
    ):
        state ^= shifted
        state *= np.uint32(multiplier)
        if high is not None:
            state ^= high
        np.right_shift(state, np.uint32(shift), out=shifted)
    state ^= shifted
    return state


def mask(
    input_ids: np.ndarray,
    lengths: np.ndarray,
    first_lengths: np.ndarray,
    keys: np.ndarray,
    mask_tokens: int,
    mask_share: float,
    words: MaskWords,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks samples in place; gives mlm_positions [N, M], mlm_labels [N, M] and mlm_counts [N], as a shard has them.

    `keys` [N] uint64: each sample's randomness. Of each sample `mask_share` of its tokens are chosen, at least 1 and at
    most `mask_tokens`, never its [CLS] and [SEP] (`first_lengths` counts those of the first segment). With
    `words.continues` they are chosen as whole words, in random order, leaving out those too long for what is left of
    that number; so they may be fewer. 80 % of the chosen become [MASK], 10 % a random word, 10 % stay.
    """
    count = len(input_ids)
    positions = np.zeros((count, mask_tokens), np.uint16)
    labels = np.zeros((count, mask_tokens), input_ids.dtype)
    counts = np.zeros(count, np.uint16)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        counts[block] = mask_block(
            input_ids[block],
            lengths[block].astype(np.int32),
            first_lengths[block].astype(np.int32),
            keys[block],
            mask_share,
            words,
            positions[block],
            labels[block],
        )
    return positions, labels, counts


def mask_budget(lengths: np.ndarray, mask_share: float, mask_tokens: int) -> np.ndarray:
    """How many tokens of samples of `lengths` [N] are masked, [N] int32; whole words may leave some over."""
    lengths = lengths.astype(np.int32)
    return np.clip(np.rint(mask_share * lengths), 1, np.clip(lengths - 3, 0, mask_tokens)).astype(np.int32)


def mask_block(
    input_ids: np.ndarray,
    lengths: np.ndarray,
    first_lengths: np.ndarray,
    keys: np.ndarray,
    mask_share: float,
    words: MaskWords,
    positions: np.ndarray,
    labels: np.ndarray,
) -> np.ndarray:
    """Fills positions and labels, which are zero; gives the counts."""
    sequence_length, mask_tokens = input_ids.shape[1], positions.shape[1]
    budget = mask_budget(lengths, mask_share, mask_tokens)
    position = np.arange(sequence_length, dtype=np.uint16)
    special = position >= (lengths - 1)[:, None].astype(np.uint16)
    special[:, 0] = True
    special[np.arange(len(lengths)), first_lengths - 1] = True
    # Random bits above, positions below: the smallest are a random choice, and integers sort fast.
    low_bits = np.uint32((1 << max(1, (sequence_length - 1).bit_length())) - 1)
    order = random_32(keys[:, None], position.astype(np.uint32))
    order &= ~low_bits
    order |= position
    if words.continues is None:
        np.putmask(order, special, np.uint32(ALL_ONES))
        order.partition(mask_tokens - 1, axis=1)
        order = np.sort(order[:, :mask_tokens], axis=1)
        order &= low_bits
        order[np.arange(mask_tokens) >= budget[:, None]] = sequence_length
        order.sort(axis=1)
        used = order < sequence_length
        row, slot = np.nonzero(used)
        chosen = order[used]
        counts = budget
    else:
        row, chosen = np.nonzero(choose_words(order, low_bits, special, words.continues[input_ids], budget))
        counts = np.bincount(row, minlength=len(lengths))
        slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)

    token = row * sequence_length + chosen
    flat_ids = input_ids.reshape(-1)
    masked_slot = row * mask_tokens + slot
    positions.reshape(-1)[masked_slot] = chosen
    labels.reshape(-1)[masked_slot] = flat_ids[token]

    token_keys = keys[row]
    dice = random_32(token_keys, chosen.astype(np.uint32) + np.uint32(DICE))
    flat_ids[token[dice < EIGHT_TENTHS]] = words.mask_id
    other = np.flatnonzero((dice >= EIGHT_TENTHS) & (dice < NINE_TENTHS))
    draw = random_32(token_keys[other], chosen[other].astype(np.uint32) + np.uint32(RANDOM_WORD)).astype(np.uint64)
    flat_ids[token[other]] = words.random_ids[
        (draw * np.uint64(len(words.random_ids)) >> np.uint64(32)).astype(np.int64)
    ]
    return counts


def choose_words(
    order: np.ndarray, low_bits: np.uint32, special: np.ndarray, continues: np.ndarray, budget: np.ndarray
) -> np.ndarray:
    """[N, L] bool: the tokens of words taken in the order of their first tokens' `order` as long as they fit the budget
    [N]."""
    sequence_length = order.shape[1]
    inner = continues & ~special
    inner[:, 1:] &= ~special[:, :-1]  # a piece right after [CLS] or [SEP] begins what is there of its word
    starts = ~inner & ~special
    place = np.arange(sequence_length, dtype=np.uint16)
    bounds = np.where(inner, np.uint16(sequence_length), place)
    ends = np.full_like(bounds, sequence_length)
    ends[:, :-1] = np.minimum.accumulate(bounds[:, :0:-1], axis=1)[:, ::-1]

    # A row a rank: those of all samples are looked at together.
    ranked = np.sort(np.where(starts, order, np.uint32(ALL_ONES)), axis=1).T
    places = np.arange(len(order)) * sequence_length + (ranked & low_bits).clip(max=sequence_length - 1)
    sizes = (ends - place).ravel()[places]
    sizes[ranked == ALL_ONES] = sequence_length
    left, taken_starts = budget.astype(np.uint16), np.zeros(order.size, bool)
    shortest = np.minimum.accumulate(sizes[::-1], axis=0)[::-1]
    for own_places, own_sizes, shortest_to_come in zip(places, sizes, shortest):
        if not (shortest_to_come <= left).any():
            break
        fits = own_sizes <= left
        taken_starts[own_places[fits]] = True
        left -= own_sizes * fits
    own_start = np.maximum.accumulate(np.where(starts, place, np.uint16(0)), axis=1)
    own_start = own_start + np.arange(len(order))[:, None] * sequence_length
    return taken_starts[own_start] & ~special
