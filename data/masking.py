"""Masking of tokens as BERT does it, by `data.prepare` once or by the loader anew in each epoch.

First a function of CHOICES chooses tokens, then `apply_masks` replaces them. Another way to choose is a function like
those here, and an entry: `CHOICES["spans"] = choose_spans`.

Shape letters: N samples, L sequence length, M mask slots, V vocabulary, K tokens that are masked, of all samples.

A sample's randomness comes from a key of its own and nothing else: each number is a hash of (key, counter). So a sample
is masked the same way whatever else is in its batch, and on any number of threads. NumPy does the work and lets go of
Python's lock in it.

After BERT (arXiv 1810.04805, section 3.1); whole words as in its program's create_masked_lm_predictions.
"""

import sys
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.samples import Samples, token_dtype
from data.shards import ShardInfo

__all__ = ["CHOICES", "Candidates", "Choose", "Masking", "choice_reference", "choose_tokens", "choose_words"]
__all__ += ["load_choice", "mask", "mask_budget", "mask_dynamic", "masking_of", "random_32", "sample_keys"]

BLOCK = 1024  # samples masked at a time: their temporaries stay in the cache
GOLDEN = 0x9E3779B97F4A7C15
ALL_ONES = 0xFFFFFFFF
# Counters of a sample's random numbers: its positions first, then the dice and the random token of each position. Those
# from 3 << 16 on are free for other ways to choose.
DICE, RANDOM_TOKEN = 1 << 16, 2 << 16
EIGHT_TENTHS, NINE_TENTHS = np.uint32(0.8 * 2**32), np.uint32(0.9 * 2**32)


@dataclass
class Candidates:
    """Tokens of N samples, of which a function of CHOICES chooses those to mask.

    The function may write to all arrays but `input_ids`.
    """

    input_ids: np.ndarray
    """[N, L] before masking"""
    special: np.ndarray
    """[N, L] bool, whether a token must not be masked: [CLS], [SEP], padding"""
    budget: np.ndarray
    """[N] int32, how many tokens to mask: fewer where a word does not fit, never more"""
    order: np.ndarray
    """[N, L] uint32, random bits above and the position below (`order & position_bits`): those that come first when
    sorted are a random choice"""
    position_bits: np.uint32
    keys: np.ndarray
    """[N] uint64, for more random numbers: `random_32(keys[:, None], counters)`"""
    continuations: Optional[np.ndarray]
    """[V] bool, whether an id continues a word (`##`); may be None with "tokens" """


Choose = Callable[[Candidates], Tuple[np.ndarray, np.ndarray]]
"""Gives the tokens to mask as np.nonzero does: samples [K], ascending, and positions [K], ascending in a sample."""


def choose_tokens(candidates: Candidates) -> Tuple[np.ndarray, np.ndarray]:
    """Each token by itself."""
    order, budget, length = candidates.order, candidates.budget, candidates.order.shape[1]
    most = int(budget.max())
    np.putmask(order, candidates.special, np.uint32(ALL_ONES))
    order.partition(most - 1, axis=1)
    positions = np.sort(order[:, :most], axis=1)
    positions &= candidates.position_bits
    chosen = np.arange(most) < budget[:, None]
    positions[~chosen] = length
    positions.sort(axis=1)
    return np.repeat(np.arange(len(order)), budget), positions[chosen]


def choose_words(candidates: Candidates) -> Tuple[np.ndarray, np.ndarray]:
    """All pieces of a word together: words in random order, each that still fits the budget."""
    order, special = candidates.order, candidates.special
    assert candidates.continuations is not None
    sequence_length = order.shape[1]
    inner = candidates.continuations[candidates.input_ids] & ~special
    inner[:, 1:] &= ~special[:, :-1]  # a piece right after [CLS] or [SEP] begins what is there of its word
    starts = ~inner & ~special
    place = np.arange(sequence_length, dtype=np.uint16)
    bounds = np.where(inner, np.uint16(sequence_length), place)
    ends = np.full_like(bounds, sequence_length)
    ends[:, :-1] = np.minimum.accumulate(bounds[:, :0:-1], axis=1)[:, ::-1]

    # One row for each rank: all samples' first words are chosen together, then their second ones ...
    ranked = np.sort(np.where(starts, order, np.uint32(ALL_ONES)), axis=1).T
    places = np.arange(len(order)) * sequence_length + (ranked & candidates.position_bits).clip(max=sequence_length - 1)
    sizes = (ends - place).ravel()[places]
    sizes[ranked == ALL_ONES] = sequence_length
    left, chosen_starts = candidates.budget.astype(np.uint16), np.zeros(order.size, bool)
    shortest = np.minimum.accumulate(sizes[::-1], axis=0)[::-1]  # of a rank and those after it
    for rank_places, rank_sizes, rank_shortest in zip(places, sizes, shortest):
        if not (rank_shortest <= left).any():
            break
        fits = rank_sizes <= left
        chosen_starts[rank_places[fits]] = True
        left -= rank_sizes * fits
    own_start = np.maximum.accumulate(np.where(starts, place, np.uint16(0)), axis=1)
    own_start = own_start + np.arange(len(order))[:, None] * sequence_length
    rows, positions = np.nonzero(chosen_starts[own_start] & ~special)
    return rows, positions


CHOICES: Dict[str, Choose] = {"tokens": choose_tokens, "words": choose_words}
"""What is masked together, by the name that --masked-units has and shards hold."""


def choice_reference(name: str, where: str = "--masked-units") -> str:
    """The "module:function" of an entry of CHOICES, from which `load_choice` gets the function in another process.

    Raises InputError, which says `where` the name stands, when there is no such entry or it is in no module.
    """
    if name not in CHOICES:
        raise InputError(f"{where}: {name!r} tokens cannot be masked together, expected {' or '.join(CHOICES)}")
    choose, module = CHOICES[name], CHOICES[name].__module__
    if module == "__main__":  # python -m knows its module's name, python with a path does not
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None:
            raise InputError(
                f"{where}: {choose.__name__} is defined in the program itself, where other processes do not find it. "
                "Start the program as a module, python -m"
            )
        module = spec.name
    return f"{module}:{choose.__qualname__}"


def load_choice(reference: str) -> Choose:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Masking:
    """How samples are masked, and what that takes of their vocabulary."""

    choose: Choose
    share: float
    """of a sample's tokens that are masked"""
    mask_id: int
    random_ids: np.ndarray
    """the ids that may stand for a masked token: all but the special ones, in the type of a shard's ids"""
    continuations: Optional[np.ndarray] = None
    """[V] bool, as in Candidates"""

    @staticmethod
    def of(
        choose: Choose,
        share: float,
        vocab_size: int,
        special_ids: Sequence[int],
        continuations: Optional[np.ndarray] = None,
    ) -> "Masking":
        """`special_ids`: of [PAD], [UNK], [CLS], [SEP] and [MASK], in this order."""
        random_ids = np.delete(np.arange(vocab_size), list(special_ids)).astype(token_dtype(vocab_size))
        return Masking(choose, share, int(special_ids[4]), random_ids, continuations)


def masking_of(shard: ShardInfo, choose: Optional[Choose] = None) -> Masking:
    """How to mask the samples of a shard. `choose`: the function of its `masked_units`, by default CHOICES'."""
    continuations = None
    if shard.continuations:
        bits = np.frombuffer(bytes.fromhex(shard.continuations), np.uint8)
        continuations = np.unpackbits(bits)[: shard.vocab_size].astype(bool)
    choose = choose or load_choice(choice_reference(shard.masked_units, shard.path))
    return Masking.of(choose, shard.mask_share, shard.vocab_size, shard.special_ids, continuations)


def mask_dynamic(samples: Samples, sample_indices: np.ndarray, seed: int, epoch, masking: Masking) -> Samples:
    """Unmasked samples, masked for one epoch: a pure function of each sample, its index, the seed and the epoch.

    `sample_indices` [N]: the samples' numbers in the data set, counted through its shards. `epoch`: of all, or of each.
    The given samples stay as they are; those returned have their own `input_ids` and `mlm_` arrays, and share the rest.
    """
    masks = {name: np.zeros_like(getattr(samples, name)) for name in ("mlm_positions", "mlm_labels", "mlm_counts")}
    masked = replace(samples, input_ids=samples.input_ids.copy(), **masks)
    mask(masked, sample_keys(seed, epoch, sample_indices), masking)
    return masked


def sample_keys(seed: int, epoch, sample_indices: np.ndarray) -> np.ndarray:
    """A random key for each sample, [N] uint64, from the seed, the epoch and its index."""
    of_seed = mixed_64(np.array([seed], np.uint64) + np.uint64(GOLDEN))
    of_epoch = mixed_64((of_seed ^ np.atleast_1d(epoch).astype(np.uint64)) + np.uint64(GOLDEN))
    return mixed_64(of_epoch + np.asarray(sample_indices).astype(np.uint64) * np.uint64(GOLDEN))


def mixed_64(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_32(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """32 random bits for each key (uint64) and counter (uint32), which broadcast.

    The hash is lowbias32 (Wellons, "Prospecting for hash functions") of both halves of the key and the counter.
    """
    state = counters * np.uint32(GOLDEN >> 32) + keys.astype(np.uint32)
    state ^= state >> np.uint32(16)
    state *= np.uint32(0x7FEB352D)
    state ^= (keys >> np.uint64(32)).astype(np.uint32)
    state ^= state >> np.uint32(15)
    state *= np.uint32(0x846CA68B)
    state ^= state >> np.uint32(16)
    return state


def mask(samples: Samples, keys: np.ndarray, masking: Masking) -> None:
    """Masks samples, whose `mlm_` arrays are zeros, in place. `keys` [N] uint64: each sample's randomness.

    Of a sample's tokens `mask_budget` are chosen, fewer where whole words do not fit. 80 % of the chosen become [MASK],
    10 % a random token, 10 % stay.
    """
    for start in range(0, len(samples), BLOCK):
        block = slice(start, start + BLOCK)
        part = samples.take(block)
        candidates = candidates_of(part, keys[block], masking)
        rows, positions = masking.choose(candidates)
        part.mlm_counts[:] = np.bincount(rows, minlength=len(part))
        if (part.mlm_counts > candidates.budget).any():
            raise ValueError(f"{masking.choose.__name__} chose more tokens of a sample than its budget")
        apply_masks(part, rows, positions, keys[block], masking)


def mask_budget(lengths: np.ndarray, first_lengths: np.ndarray, mask_share: float, mask_tokens: int) -> np.ndarray:
    """How many tokens of each sample to mask, [N] int32: `mask_share` of them, at least 1 and at most `mask_tokens`.

    Never its [CLS] and [SEP]: three tokens of a sample of two segments, two of one.
    """
    lengths = lengths.astype(np.int32)
    maskable = lengths - 2 - (first_lengths < lengths)
    return np.clip(np.rint(mask_share * lengths), 1, np.clip(maskable, 0, mask_tokens)).astype(np.int32)


def candidates_of(samples: Samples, keys: np.ndarray, masking: Masking) -> Candidates:
    length, lengths = samples.input_ids.shape[1], samples.lengths.astype(np.int32)
    position = np.arange(length, dtype=np.uint16)
    special = position >= (lengths - 1)[:, None].astype(np.uint16)
    special[:, 0] = True
    special[np.arange(len(samples)), samples.first_lengths.astype(np.int32) - 1] = True
    position_bits = np.uint32((1 << max(1, (length - 1).bit_length())) - 1)
    order = random_32(keys[:, None], position.astype(np.uint32))
    order &= ~position_bits
    order |= position
    budget = mask_budget(lengths, samples.first_lengths, masking.share, samples.mlm_positions.shape[1])
    return Candidates(samples.input_ids, special, budget, order, position_bits, keys, masking.continuations)


def apply_masks(samples: Samples, rows: np.ndarray, positions: np.ndarray, keys: np.ndarray, masking: Masking) -> None:
    """Replaces the chosen tokens, `mlm_counts` of each sample, and notes them in mlm_positions and mlm_labels."""
    used = np.arange(samples.mlm_positions.shape[1], dtype=np.uint16) < samples.mlm_counts[:, None]
    tokens = rows * samples.input_ids.shape[1] + positions
    flat_ids = samples.input_ids.reshape(-1)
    samples.mlm_positions[used] = positions
    samples.mlm_labels[used] = flat_ids[tokens]

    token_keys = keys[rows]
    dice = random_32(token_keys, positions.astype(np.uint32) + np.uint32(DICE))
    flat_ids[tokens[dice < EIGHT_TENTHS]] = masking.mask_id
    other = np.flatnonzero((dice >= EIGHT_TENTHS) & (dice < NINE_TENTHS))
    draw = random_32(token_keys[other], positions[other].astype(np.uint32) + np.uint32(RANDOM_TOKEN)).astype(np.uint64)
    drawn = draw * np.uint64(len(masking.random_ids)) >> np.uint64(32)
    flat_ids[tokens[other]] = masking.random_ids[drawn.astype(np.int64)]
