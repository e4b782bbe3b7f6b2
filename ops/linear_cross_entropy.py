"""The MLM decoder and its cross-entropy: the plain form, and a serialized one that never holds all logits.

Shape letters: T tokens (mask slots), H hidden, V vocabulary.
"""

import functools
import importlib.util
import math
from typing import Callable, Iterable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.ipu import is_lowering, matmul_memory, serialized_matmul
from ops.native import (
    accumulate_bias_grad,
    accumulate_weight_grad,
    add_weight_grad,
    call,
    grad_of,
    is_native,
    linear,
    linear_input_grad,
)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_lowered", "linear_cross_entropy_plain"]


def linear_cross_entropy(
    hidden, decoder, bias, labels, weights, factor: Optional[int] = None
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of the tied decoder, in `factor` parts; None: in as many as keep a part's logits small.

    hidden [T, H], decoder [V, H] (the word embedding), bias [V], labels [T] integers, weights [T] float32.
    Returns sum(weights * cross-entropy) and sum(weights * (argmax == label)), float32 scalars; the second has no
    gradient.

    In training, each part's logits become its gradients at once and are dropped: one pass, T/factor x V logits at a
    time. The matrix products are in the tensors' type; the softmax and the sums are
    float32 always.
    """
    if is_lowering():
        return linear_cross_entropy_lowered(hidden, decoder, bias, labels, weights, factor or 1)
    training = torch.is_grad_enabled() and hidden.requires_grad
    if factor is None:
        in_place = training and _kernel(hidden.device.type) is not None
        logit_bytes = (hidden.element_size() if in_place else 4) * len(hidden) * len(decoder)
        factor = max(1, -(-logit_bytes // _part_bytes(hidden.device)))
    if training:
        if is_native(hidden, parameters=(decoder, bias)) and weights.dtype == torch.float32:
            return _NativeLinearCrossEntropy.apply(hidden, decoder, bias, labels, weights, factor)
        return _LinearCrossEntropy.apply(hidden, decoder, bias, labels, weights, factor)
    parts = _parts(factor, hidden, labels, weights)
    sums = [linear_cross_entropy_plain(x, decoder, bias, y, w) for x, y, w in parts]
    loss, correct = (sum(parts[1:], parts[0]) for parts in zip(*sums))
    return loss, correct


def linear_cross_entropy_plain(hidden, decoder, bias, labels, weights) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same with all logits at once: the serialized form is tested against it."""
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


def _part_bytes(device: torch.device) -> int:
    """Bytes of a part's logits where the factor is left open."""
    if device.type == "cpu":
        return 32 * 2**20  # they stay near the caches
    if device.type != "cuda":
        return 512 * 2**20
    # The larger the products, the better. Beside the activations of a micro-batch this is little.
    return min(2**31, torch.cuda.get_device_properties(device).total_memory // 40)


def _parts(factor: int, *tensors: torch.Tensor) -> Iterable[Tuple[torch.Tensor, ...]]:
    return zip(*(tensor.chunk(factor) for tensor in tensors))


@functools.lru_cache(maxsize=None)
def _kernel(device: str) -> Optional[Callable]:
    """`_cross_entropy` as one Triton kernel; None where there is none for the device."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from ops.cross_entropy_triton import cross_entropy

    return cross_entropy


def _cross_entropy(logits, labels, weights) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's cross-entropy, whether its label is the argmax, and the gradients, written over float32 logits."""
    dtype, rows = logits.dtype, torch.arange(len(labels), device=labels.device)
    logits = logits.float()
    correct = (logits.argmax(dim=-1) == labels).float()
    normalizer = logits.logsumexp(dim=-1)
    losses = normalizer - logits[rows, labels]
    # d loss / d logits = w * (softmax - one_hot(label)), written over the logits.
    gradient = logits.sub_(normalizer[:, None]).exp_().mul_(weights[:, None])
    gradient[rows, labels] -= weights
    return losses, correct, gradient.to(dtype)


def _add_product(total: Optional[torch.Tensor], gradient, x) -> torch.Tensor:
    """`total`, None for 0, plus gradient [T, V] transposed times x [T, H], in float32."""
    if x.is_cuda and x.dtype != torch.float32 and "dtype" in torch.ops.aten.addmm.overloads():
        if total is None:
            return torch.mm(gradient.t(), x, out_dtype=torch.float32)
        return torch.addmm(total, gradient.t(), x, out_dtype=torch.float32)
    if total is None:
        return (gradient.t() @ x).float()
    if x.dtype == torch.float32:
        return total.addmm_(gradient.t(), x)
    return total.add_(gradient.t() @ x)


class _LinearCrossEntropy(torch.autograd.Function):
    # The gradients for a loss gradient of 1 are made in the forward pass, part by part, and scaled in the backward one.
    @staticmethod
    def forward(ctx, hidden, decoder, bias, labels, weights, factor):
        vocab, kernel = len(decoder), _kernel(hidden.device.type)
        if kernel is not None:
            # Rows of whole cache lines, which the matrix units and the kernel take several values of at a time; the
            # tokens that fill them up have probability 0.
            decoder, bias = F.pad(decoder, (0, 0, 0, -vocab % 64)), F.pad(bias, (0, -vocab % 64), value=-math.inf)
        losses, correct, hidden_gradients = [], [], []
        decoder_gradient, bias_gradient = None, torch.zeros_like(bias, dtype=torch.float32)
        for x, y, w in _parts(factor, hidden, labels, weights):
            logits = F.linear(x, decoder, bias.to(decoder.dtype))
            part_losses, part_correct, gradient = (kernel or _cross_entropy)(logits, y.long(), w)
            losses.append(part_losses)
            correct.append(part_correct)
            hidden_gradients.append(gradient @ decoder)
            decoder_gradient = _add_product(decoder_gradient, gradient, x)
            bias_gradient += gradient.sum(dim=0, dtype=torch.float32)
        decoder_gradient = decoder_gradient[:vocab].to(decoder.dtype)
        ctx.save_for_backward(torch.cat(hidden_gradients), decoder_gradient, bias_gradient[:vocab])
        weighted_correct = torch.dot(weights, torch.cat(correct))
        ctx.mark_non_differentiable(weighted_correct)
        return torch.dot(weights, torch.cat(losses)), weighted_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        return (*(gradient * loss_gradient for gradient in ctx.saved_tensors),) + (None,) * 3


class _NativeLinearCrossEntropy(torch.autograd.Function):
    # The same with the CPU's kernels. The logits' gradients of few tokens are smaller than the gradient of the decoder:
    # they are kept for the backward pass, which adds their product to the decoder's own gradient.
    @staticmethod
    def forward(ctx, hidden, decoder, bias, labels, weights, factor):
        ctx.decoder, ctx.bias = decoder, bias
        losses, correct, hidden_gradients, kept = torch.empty_like(weights), torch.empty_like(weights), [], []
        few = len(hidden) * hidden.element_size() <= 4 * hidden.shape[1]
        totals = () if few else (hidden.new_zeros(decoder.shape, dtype=torch.float32), torch.zeros(len(bias)))
        for x, y, w, loss, right in _parts(factor, hidden, labels, weights, losses, correct):
            logits = linear(x, decoder, bias)
            call("cross_entropy", logits, y.long(), w, loss, right, *logits.shape)
            hidden_gradients.append(linear_input_grad(logits, decoder))
            if few:
                kept.append(logits)
            else:
                add_weight_grad(totals[0], logits, x)
                call("add_token_sums", logits, totals[1], *logits.shape)
        ctx.save_for_backward(hidden, torch.cat(hidden_gradients), *totals, *kept)
        ctx.few, weighted_correct = few, torch.dot(weights, correct)
        ctx.mark_non_differentiable(weighted_correct)
        return torch.dot(weights, losses), weighted_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        hidden, hidden_gradient, *others = ctx.saved_tensors
        scale = loss_gradient.item()
        if ctx.few:
            for gradient, x in zip(others, hidden.split([len(part) for part in others])):
                gradient = gradient if scale == 1.0 else gradient * scale
                accumulate_weight_grad(ctx.decoder, gradient, x)
                accumulate_bias_grad(ctx.bias, gradient)
        else:
            for parameter, total in zip((ctx.decoder, ctx.bias), others):
                grad_of(parameter).add_(total, alpha=scale)
        return (hidden_gradient * scale,) + (None,) * 5
