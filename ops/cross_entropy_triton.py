"""Cross-entropy of the MLM logits and its gradients in one Triton kernel, which reads the logits twice and writes once.

Shape letters: T tokens (mask slots), V vocabulary.
"""

import contextlib
from typing import Tuple

import torch
import triton
import triton.language as tl

__all__ = ["cross_entropy"]

BLOCK = 4096  # logits of a row at a time: 16 a thread


@triton.jit
def _cross_entropy_kernel(logits, labels, weights, losses, correct, V: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # 64 bits: T * V is beyond 32
    row = logits + token * V
    label, weight = tl.load(labels + token), tl.load(weights + token)
    at_label = tl.load(row + label).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    highest, total = float("-inf"), 0.0  # total: sum(exp(logit - highest)) of what was read so far
    for first in range(0, V, BLOCK):
        x = tl.load(row + first + lanes, mask=first + lanes < V, other=float("-inf")).to(tl.float32)
        before, highest = highest, tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), axis=0)
    factor, best = weight / total, V  # best: the first token with the highest logit
    for first in range(0, V, BLOCK):
        inside = first + lanes < V
        x = tl.load(row + first + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        best = tl.minimum(best, tl.min(tl.where(x == highest, first + lanes, V), axis=0))
        gradient = factor * tl.exp(x - highest) - tl.where(first + lanes == label, weight, 0.0)
        tl.store(row + first + lanes, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + token, highest + tl.log(total) - at_label)
    tl.store(correct + token, (best == label).to(tl.float32))


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [T, V] (float32, bfloat16 or float16), labels [T] integers, weights [T] float32, all contiguous, on CUDA.

    Returns, for each token, the unweighted cross-entropy and whether its label is the first that has the highest logit,
    both [T] float32, and the logits, now overwritten with their gradients weights[t] * (softmax - one_hot(label)). The
    arithmetic is float32.
    """
    losses, correct = torch.empty_like(weights), torch.empty_like(weights)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        _cross_entropy_kernel[(len(logits),)](
            logits, labels, weights, losses, correct, logits.shape[1], BLOCK, num_warps=8
        )
    return losses, correct, logits
