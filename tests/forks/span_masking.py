"""Masking of spans, as SpanBERT's (arXiv 1907.10529, section 3.1): of 1 to 10 tokens, short ones more often.

    python -m tests.forks.span_masking --masked-units spans --input python --vocab-size 8192 --output shards/

With `--masking dynamic`, training needs it too: CHOICES is looked up where a run starts.
"""

import sys

import numpy as np

from data import prepare
from data.masking import ALL_ONES, CHOICES, random_32

SPANS = 3 << 16  # behind the counters that data/masking.py uses
LONGEST, STOP = 10, 0.2


def choose_spans(candidates):
    order, position = candidates.order, np.arange(candidates.order.shape[1])
    chosen, left = np.zeros(order.shape, bool), candidates.budget.copy()
    # A geometric distribution, from uniform numbers.
    uniform = (random_32(candidates.keys[:, None], position.astype(np.uint32) + np.uint32(SPANS)) + 0.5) / 2**32
    sizes = np.minimum(1 + np.log(uniform) // np.log(1 - STOP), LONGEST).astype(int)
    starts = np.sort(np.where(candidates.special, np.uint32(ALL_ONES), order), axis=1) & candidates.position_bits
    for start in starts.T[:, :, None].clip(max=len(position) - 1):  # the first start of all samples, the second ...
        if not left.any():
            break
        span = (position >= start) & (position < start + np.take_along_axis(sizes, start, axis=1))
        span &= ~candidates.special & ~chosen
        span &= span.cumsum(axis=1) <= left[:, None]
        chosen |= span
        left -= span.sum(axis=1)
    return np.nonzero(chosen)


CHOICES["spans"] = choose_spans

if __name__ == "__main__":
    sys.exit(prepare.main())
