"""Token ids to samples: documents cut into pairs of segments, or single ones, assembled and masked, as arrays.

Shape letters: T tokens, U units (lines) and D documents of a chunk, N samples, L sequence length.

A cursor walks each document. Per sample it takes a window of L - 3 tokens (now and then a shorter one), cut in two at
the end of a line where the window has one, else near its middle. The first part is the first segment. The second
segment is the second part, or, in half of the samples, as many tokens of another document; then the second part is left
for the next sample. So every token is in a first segment or in a second one that follows it, exactly once. A random
second segment begins at a line's start where the window was cut at one, and inside a line where it was not, and is as
long as the part it replaces: whether it follows can be read neither from where it begins nor from its length.

Samples of one segment are the windows themselves, of L - 2 tokens.

After BERT (arXiv 1810.04805, section 3.1 and appendix A.2), whose own program cuts long documents' ends off.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Iterator, Optional, Sequence, Tuple

import numpy as np
from numpy.random import Generator

from data.masking import Masking, mask
from data.preparing.options import PrepareOptions
from data.samples import Samples

__all__ = ["Chunk", "Cuts", "assemble", "cut_pairs", "cut_single", "make_samples"]

BLOCK = 4096  # samples assembled at a time: a few MB of temporaries, which stay in the cache


@dataclass
class Chunk:
    """Documents that samples are made of together; none is empty, nor is a unit."""

    tokens: np.ndarray  # [T] ids of all documents end to end
    unit_starts: np.ndarray  # [U] where units begin, ascending; each document begins with a unit
    document_starts: np.ndarray  # [D + 1] where documents begin, ascending, and T


@dataclass
class Cuts:
    """N samples as places in a chunk; each field is [N], integers. A sample of one segment has a second one of 0."""

    first_starts: np.ndarray
    first_lengths: np.ndarray
    second_starts: np.ndarray
    second_lengths: np.ndarray
    nsp_labels: np.ndarray


def cut_pairs(chunk: Chunk, sequence_length: int, short_share: float, rng: Generator) -> Tuple[Cuts, int]:
    """Cuts a chunk into samples, in the order of the text, and counts the tokens that no sample holds.

    Those are the documents of a single token in a chunk without another document, which give no pair; else the count is
    0. A chunk with one document gives only samples whose second segment follows.
    """
    units, bounds = chunk.unit_starts.tolist(), chunk.document_starts.tolist()
    pairs_with_others = len(bounds) > 2
    longest = sequence_length - 3
    draws = endless_draws(longest, short_share, rng)
    rows, dropped = [], 0
    for document, (start, end) in enumerate(zip(bounds, bounds[1:])):
        while start < end:
            target, follows, place = next(draws)
            window = min(target, end - start)
            if end - start - window == 1:  # a last token alone would have nothing to be paired with
                window += 1 if window < longest else -1
            if window == 1 and not pairs_with_others:
                dropped += 1
                break
            low = bisect_right(units, start)
            high = bisect_left(units, start + window, low)
            if low < high:
                first = units[low + int(place * (high - low))] - start
            else:
                first = max(1, int(window * (0.25 + 0.5 * place)))
            if window == 1:
                rows.append((document, start, 1, target - 1, True, 1))
            else:
                follows = follows or not pairs_with_others
                rows.append((document, start, first, window - first, low < high, not follows))
            start += window if follows and window > 1 else first
    document, starts, firsts, seconds, at_unit, labels = np.array(rows, np.int64).reshape(-1, 6).T
    cuts = Cuts(starts, firsts, starts + firsts, seconds, labels)
    random = np.flatnonzero(labels)
    cuts.second_starts[random], cuts.second_lengths[random] = other_segments(
        chunk, document[random], seconds[random], at_unit[random].astype(bool), rng
    )
    return cuts, dropped


def cut_single(chunk: Chunk, sequence_length: int, short_share: float, rng: Generator) -> Cuts:
    """Cuts a chunk into samples of one segment, in the order of the text; each token is in exactly one of them."""
    longest = sequence_length - 2
    sizes = np.diff(chunk.document_starts)
    targets = draw_targets(longest, short_share, rng, int(((sizes + 1) // 2).sum()))  # enough if all are 2
    ends = np.cumsum(targets)
    # A document takes targets until they reach its end, where the last one is cut; the next document takes those after.
    ends_list, last_of_documents, taken = ends.tolist(), [], 0
    for size in sizes.tolist():
        last_of_documents.append(bisect_left(ends_list, taken + size))
        taken = ends_list[last_of_documents[-1]]
    last = np.array(last_of_documents)
    lengths = targets[: last[-1] + 1]
    lengths[last] -= np.diff(ends[last], prepend=0) - sizes
    none = np.zeros_like(lengths)
    return Cuts(np.cumsum(lengths) - lengths, lengths, none, none, none)


def draw_targets(longest: int, short_share: float, rng: Generator, count: int) -> np.ndarray:
    """How many tokens `count` samples are to take, [count]: `longest`, or a random share of them 2 to `longest`."""
    short = rng.random(count) < short_share
    return np.where(short, rng.integers(2, longest + 1, count), longest)


def endless_draws(longest: int, short_share: float, rng: Generator) -> Iterator[Tuple[int, bool, float]]:
    """For each sample: how many tokens to take, whether the second segment follows, and where in [0, 1) to split."""
    while True:
        targets = draw_targets(longest, short_share, rng, BLOCK)
        yield from zip(targets.tolist(), (rng.random(BLOCK) < 0.5).tolist(), rng.random(BLOCK).tolist())


def other_segments(
    chunk: Chunk, own: np.ndarray, lengths: np.ndarray, at_unit: np.ndarray, rng: Generator
) -> Tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of random segments outside the document `own`; shorter than asked only where a whole document
    is."""
    unit_bounds = np.searchsorted(chunk.unit_starts, chunk.document_starts)

    def draw(bounds):
        size = bounds[own + 1] - bounds[own]
        drawn = (rng.random(len(own)) * (bounds[-1] - size)).astype(np.int64)
        return drawn + size * (drawn >= bounds[own])

    starts = np.where(at_unit, chunk.unit_starts[draw(unit_bounds)], draw(chunk.document_starts))
    other = np.searchsorted(chunk.document_starts, starts, side="right") - 1
    begins, ends = chunk.document_starts[other], chunk.document_starts[other + 1]
    starts = np.minimum(starts, np.maximum(begins, ends - lengths))
    unit = chunk.unit_starts[np.searchsorted(chunk.unit_starts, starts, side="right") - 1]
    starts = np.where(at_unit, unit, starts)
    return starts, np.minimum(lengths, ends - starts)


def assemble(
    tokens: np.ndarray, cuts: Cuts, sequence_length: int, cls_id: int, sep_id: int
) -> Tuple[np.ndarray, np.ndarray]:
    """input_ids [N, L] and lengths [N] of samples before masking: [CLS] first [SEP], any second [SEP], then zeros."""
    position = np.arange(sequence_length)
    first_end = (cuts.first_lengths + 1)[:, None]
    last = first_end + np.where(cuts.second_lengths, cuts.second_lengths + 1, 0)[:, None]
    source = position + np.where(
        position < first_end, (cuts.first_starts - 1)[:, None], (cuts.second_starts - cuts.first_lengths - 2)[:, None]
    )
    input_ids = tokens.take(source, mode="clip")
    input_ids[position > last] = 0
    input_ids[:, 0] = cls_id
    np.put_along_axis(input_ids, first_end, sep_id, axis=1)
    np.put_along_axis(input_ids, last, sep_id, axis=1)
    return input_ids, last[:, 0] + 1


def make_samples(
    chunk: Chunk, special_ids: Sequence[int], masking: Optional[Masking], options: PrepareOptions, rng: Generator
) -> Tuple[Iterator[Samples], int]:
    """The samples of a chunk in blocks, as an iterator, and the number of tokens that are in none of them.

    `special_ids`: of [PAD], [UNK], [CLS], [SEP] and [MASK]. `masking`: None leaves the samples unmasked, for the
    loader to mask. The chunk's tokens have the vocabulary's type (`data.samples.token_dtype`).
    """
    sequence_length, mask_tokens = options.sequence_length, options.mask_tokens
    size = (sequence_length, options.short_share)
    cuts, dropped = cut_pairs(chunk, *size, rng) if options.nsp else (cut_single(chunk, *size, rng), 0)

    def blocks() -> Iterator[Samples]:
        for start in range(0, len(cuts.nsp_labels), BLOCK):
            block = Cuts(**{name: values[start : start + BLOCK] for name, values in vars(cuts).items()})
            input_ids, lengths = assemble(chunk.tokens, block, sequence_length, special_ids[2], special_ids[3])
            count = len(lengths)
            samples = Samples(
                input_ids,
                lengths.astype(np.uint16),
                (block.first_lengths + 2).astype(np.uint16),
                np.zeros((count, mask_tokens), np.uint16),
                np.zeros((count, mask_tokens), input_ids.dtype),
                np.zeros(count, np.uint16),
                block.nsp_labels.astype(np.uint8),
            )
            if masking is not None:
                mask(samples, rng.integers(0, 1 << 64, count, np.uint64), masking)
            yield samples

    return blocks(), dropped
