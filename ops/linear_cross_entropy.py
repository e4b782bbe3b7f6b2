"""The MLM decoder and its cross-entropy: the plain form, and a serialized one that never holds all logits.

Shape letters: T tokens (mask slots), H hidden, V vocabulary.
"""

import functools
import importlib.util
import math
from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.ipu import is_lowering, matmul_memory, serialized_matmul
from ops.native import call, gradient_of, is_native, product, product_transposed

__all__ = ["linear_cross_entropy", "linear_cross_entropy_lowered", "linear_cross_entropy_plain"]

# Bytes of a part's float32 logits where the factor is left open. On the CPU they stay near the caches, on CUDA the
# matrix units are busy.
LOGIT_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def linear_cross_entropy(
    hidden, decoder, bias, labels, weights, factor: Optional[int] = None
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of the tied decoder, in `factor` parts; None: in as many as keep a part's logits small.

    hidden [T, H], decoder [V, H] (the word embedding), bias [V], labels [T] integers, weights [T] float32.
    Returns sum(weights * cross-entropy) and sum(weights * (argmax == label)), float32 scalars; the second has no
    gradient.

    In training, each part's logits become its gradients at once and are dropped: one pass, T/factor x V logits at a
    time. The matrix products are in the tensors' type; the softmax and the sums are float32 always.
    """
    if is_lowering():
        return linear_cross_entropy_lowered(hidden, decoder, bias, labels, weights, factor or 1)
    if factor is None:
        factor = max(
            1, -(-4 * len(hidden) * len(decoder) // LOGIT_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"])
        )
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        parts = [linear_cross_entropy_plain(*part) for part in _parts(hidden, decoder, bias, labels, weights, factor)]
        return sum(loss for loss, _ in parts), sum(correct for _, correct in parts)
    if is_native(hidden, weights, parameters=(decoder, bias)):
        return _NativeLoss.apply(hidden, decoder, bias, labels, weights, factor)
    return _SerializedLoss.apply(hidden, decoder, bias, labels, weights, factor)


def linear_cross_entropy_plain(hidden, decoder, bias, labels, weights) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same with all logits at once: what the serialized form is held to."""
    logits = F.linear(hidden, decoder, bias.to(decoder.dtype)).float()
    loss = F.cross_entropy(logits, labels.long(), reduction="none")
    correct = (logits.argmax(dim=-1) == labels).to(weights.dtype)
    return (weights * loss).sum(), (weights * correct).sum()


def linear_cross_entropy_lowered(
    hidden, decoder, bias, labels, weights, factor: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same as PopTorch lowers it: the decoder's product in `factor` parts of the vocabulary, the softmax in the
    tensors' type."""
    logits = matmul_memory(serialized_matmul(hidden, decoder, factor), "mlm_decoder") + bias
    losses = F.cross_entropy(logits, labels.long(), reduction="none").float()
    correct = (logits.argmax(dim=-1) == labels).float()
    return (weights * losses).sum(), (weights * correct).sum()


def _parts(hidden, decoder, bias, labels, weights, factor):
    for part in zip(hidden.chunk(factor), labels.chunk(factor), weights.chunk(factor)):
        yield part[0], decoder, bias, part[1], part[2]


@functools.lru_cache(maxsize=None)
def _kernel(device: str) -> Optional[Callable]:
    """`_cross_entropy` as one kernel; None where there is none for the device."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from ops.cross_entropy_triton import cross_entropy

    return cross_entropy


def _cross_entropy(logits, labels, weights) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token the cross-entropy, and whether its label is the argmax; the gradients, which overwrite float32
    logits."""
    dtype, rows = logits.dtype, torch.arange(len(labels), device=labels.device)
    logits = logits.float()
    correct = (logits.argmax(dim=-1) == labels).float()
    normalizer = logits.logsumexp(dim=-1)
    losses = normalizer - logits[rows, labels]
    # d loss / d logits = w * (softmax - one_hot(label)), written over the logits.
    gradient = logits.sub_(normalizer[:, None]).exp_().mul_(weights[:, None])
    gradient[rows, labels] -= weights
    return losses, correct, gradient.to(dtype)


class _SerializedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, decoder, bias, labels, weights, factor):
        vocab, cross_entropy = len(decoder), _kernel(hidden.device.type)
        if cross_entropy is not None:
            # Rows of whole cache lines, which the matrix units and the kernel take several values of at a time; the
            # words that fill them up have probability 0.
            decoder, bias = F.pad(decoder, (0, 0, 0, -vocab % 64)), F.pad(bias, (0, -vocab % 64), value=-math.inf)
        loss, correct = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        decoder_gradient = torch.zeros_like(decoder, dtype=torch.float32)
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32)
        gradient_parts = hidden_gradient.chunk(factor)
        for i, (x, _, _, y, w) in enumerate(_parts(hidden, decoder, bias, labels, weights, factor)):
            logits = F.linear(x, decoder, bias.to(decoder.dtype))
            part_losses, part_correct, gradient = (cross_entropy or _cross_entropy)(logits, y.long(), w)
            loss += torch.dot(w, part_losses)
            correct += torch.dot(w, part_correct)
            bias_gradient += gradient.sum(dim=0, dtype=torch.float32)
            torch.mm(gradient, decoder, out=gradient_parts[i])
            if decoder.dtype == torch.float32:
                decoder_gradient.addmm_(gradient.t(), x)
            else:
                decoder_gradient += gradient.t() @ x
        ctx.save_for_backward(hidden_gradient, decoder_gradient[:vocab].to(decoder.dtype), bias_gradient[:vocab])
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        hidden, decoder, bias = ctx.saved_tensors
        return hidden * loss_gradient, decoder * loss_gradient, bias * loss_gradient, None, None, None


class _NativeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, decoder, bias, labels, weights, factor):
        hidden_gradients, decoder_gradient, bias_gradient = [], torch.empty_like(decoder), torch.zeros_like(bias)
        losses, correct = torch.empty_like(weights), torch.empty_like(weights)
        first = 0
        for x, _, _, y, w in _parts(hidden, decoder, bias, labels, weights, factor):
            part = slice(first, first + len(x))
            first += len(x)
            logits = product(x, decoder, bias)  # become their gradients
            call("cross_entropy", logits, y.long(), w, losses[part], correct[part], *logits.shape)
            hidden_gradients.append(product_transposed(logits, decoder))
            bias_gradient += logits.sum(dim=0)
            if part.start == 0:
                torch.mm(logits.t(), x, out=decoder_gradient)
            else:
                decoder_gradient.addmm_(logits.t(), x)
        ctx.save_for_backward(torch.cat(hidden_gradients), decoder_gradient, bias_gradient)
        ctx.decoder, ctx.bias = decoder, bias
        correct = torch.dot(weights, correct)
        ctx.mark_non_differentiable(correct)
        return torch.dot(weights, losses), correct

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        hidden, decoder, bias = ctx.saved_tensors
        for parameter, gradient in ((ctx.decoder, decoder), (ctx.bias, bias)):
            gradient_of(parameter).add_(gradient, alpha=loss_gradient.item())
        return hidden * loss_gradient, None, None, None, None, None
