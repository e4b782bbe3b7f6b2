"""Linear layers, alone and with what follows them: PyTorch's, and on the CPU and CUDA with fewer passes over memory.
`float8()` makes them float8.

Shape letters: T tokens (any leading dimensions), I input features, O output features. `name` is that of the matrix
product, for its memory on IPUs: one of ops.ipu.MATMULS, or None.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops import native
from ops.cuda import takes_triton
from ops.float8 import float8_linear, is_float8, pays
from ops.ipu import is_lowering, matmul_memory
from ops.norm import layer_norm

__all__ = [
    "linear",
    "linear_dropout_add_norm",
    "linear_dropout_add_norm_plain",
    "linear_gelu",
    "linear_gelu_plain",
    "linear_plain",
    "linears",
    "linears_plain",
]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: Optional[str] = None) -> torch.Tensor:
    """A linear layer: x [T, I], weight [O, I], bias [O] -> [T, O]."""
    return linears(x, [weight], [bias], name)[0]


def linear_plain(x, weight, bias, name: Optional[str] = None) -> torch.Tensor:
    """The same in PyTorch's operations."""
    if is_lowering():
        return matmul_memory(x @ weight.t(), name) + bias
    return (float8_linear if is_float8() and pays(weight) else F.linear)(x, weight, bias)


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], name: Optional[str] = None
) -> Tuple[torch.Tensor, ...]:
    """Several linear layers of the same input: x [T, I], weights of [O, I], biases of [O] -> as many [T, O]."""
    if _is_native(x, parameters=(*weights, *biases)):
        outputs = _Linears.apply(x.flatten(0, -2), len(weights), *weights, *biases)
        return tuple(output.view(x.shape[:-1] + output.shape[-1:]) for output in outputs)
    return linears_plain(x, weights, biases, name)


def linears_plain(x, weights, biases, name: Optional[str] = None) -> Tuple[torch.Tensor, ...]:
    """The same as one product of the parameters side by side."""
    output = linear_plain(x, torch.cat(tuple(weights)), torch.cat(tuple(biases)), name)
    return output.split([len(weight) for weight in weights], dim=-1)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: Optional[str] = None) -> torch.Tensor:
    """GELU (the exact one, arXiv 1606.08415) of a linear layer: x [T, I], weight [O, I], bias [O] -> [T, O]."""
    if _is_native(x, parameters=(weight, bias)):
        return _LinearGelu.apply(x.flatten(0, -2), weight, bias).view(x.shape[:-1] + weight.shape[:1])
    return (_linear_gelu_triton if takes_triton(x) else linear_gelu_plain)(x, weight, bias, name)


def linear_gelu_plain(x, weight, bias, name: Optional[str] = None) -> torch.Tensor:
    """The same in PyTorch's operations."""
    return F.gelu(linear_plain(x, weight, bias, name))


def _linear_gelu_triton(x, weight, bias, name) -> torch.Tensor:
    from ops.gelu_triton import gelu

    output = linear_plain(x, weight, bias.detach(), name)  # the kernel gives the bias's gradient
    return gelu(output.flatten(0, -2), bias).view(output.shape)


def linear_dropout_add_norm(
    x, weight, bias, residual, norm_weight, norm_bias, eps: float, dropout: float, name: Optional[str] = None
) -> torch.Tensor:
    """LayerNorm(dropout(linear(x)) + residual): x [T, I], weight [O, I], the biases and norm_weight [O], residual [T,
    O] -> [T, O].

    `dropout` is the probability that an element is dropped: 0 where the model is not in training.
    """
    if not _is_native(x, residual, parameters=(weight, bias, norm_weight, norm_bias)):
        form = _linear_dropout_add_norm_triton if takes_triton(x) else linear_dropout_add_norm_plain
        return form(x, weight, bias, residual, norm_weight, norm_bias, eps, dropout, name)
    flat = residual.flatten(0, -2).contiguous()
    normal = _LinearDropoutAddNorm.apply(x.flatten(0, -2), weight, bias, flat, norm_weight, norm_bias, eps, dropout)
    return normal.view(residual.shape)


def linear_dropout_add_norm_plain(
    x, weight, bias, residual, norm_weight, norm_bias, eps: float, dropout: float, name: Optional[str] = None
) -> torch.Tensor:
    """The same in PyTorch's operations."""
    output = linear_plain(x, weight, bias, name)
    total = (F.dropout(output, dropout) if dropout else output) + residual
    return layer_norm(total, norm_weight, norm_bias, eps)


def _linear_dropout_add_norm_triton(x, weight, bias, residual, norm_weight, norm_bias, eps, dropout, name):
    from ops.norm_triton import dropout_add_norm

    output = linear_plain(x, weight, bias.detach(), name).flatten(0, -2)  # the kernel gives the bias's gradient
    normal = dropout_add_norm(output, bias, residual.flatten(0, -2), norm_weight, norm_bias, eps, dropout)
    return normal.view(residual.shape)


def _is_native(*tensors: torch.Tensor, parameters) -> bool:
    return not is_float8() and native.is_native(*tensors, parameters=parameters)


def _backward(ctx, gradient, x, weight) -> Optional[torch.Tensor]:
    """Adds to the gradient of `weight`, and returns that of `x` where one is needed."""
    native.accumulate_weight_grad(weight, gradient, x)
    return native.linear_input_grad(gradient, weight) if ctx.needs_input_grad[0] else None


# The Functions below return no gradients of parameters: they add them up as ops/native.py says.


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, *parameters):
        ctx.save_for_backward(x)
        ctx.weights, ctx.biases = parameters[:count], parameters[count:]
        return tuple(native.linear(x, weight, bias) for weight, bias in zip(ctx.weights, ctx.biases))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        x_gradient = None
        for gradient, weight, bias in zip(gradients, ctx.weights, ctx.biases):
            native.accumulate_bias_grad(bias, gradient)
            part = _backward(ctx, gradient, x, weight)
            x_gradient = part if x_gradient is None else x_gradient.add_(part)
        return (x_gradient, None) + (None,) * 2 * len(gradients)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        before = native.linear(x, weight, bias)
        ctx.save_for_backward(x, before)
        ctx.weight, ctx.bias = weight, bias
        after = torch.empty_like(before)
        native.call("gelu_forward", before, after, before.numel())
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, before = ctx.saved_tensors
        before_gradient, bias_gradient = torch.empty_like(before), native.grad_of(ctx.bias)
        native.call("gelu_backward", gradient.contiguous(), before, before_gradient, bias_gradient, *before.shape)
        return _backward(ctx, before_gradient, x, ctx.weight), None, None


class _LinearDropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm_weight, norm_bias, eps, dropout):
        total = native.linear(x, weight, bias)  # becomes what is normalised
        normal, statistics = torch.empty_like(total), torch.empty(len(total), 2)
        ctx.dropout = float(dropout), native.draw_seed() if dropout else 0
        outputs = normal, statistics, *total.shape
        native.call("dropout_add_norm_forward", total, residual, norm_weight, norm_bias, *outputs, eps, *ctx.dropout)
        ctx.save_for_backward(x, total, statistics)
        ctx.weight, ctx.bias, ctx.norm_weight, ctx.norm_bias = weight, bias, norm_weight, norm_bias
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, total, statistics = ctx.saved_tensors
        output_gradient, residual_gradient = torch.empty_like(total), torch.empty_like(total)
        inputs = gradient.contiguous(), total, statistics, ctx.norm_weight
        sums = [native.grad_of(parameter) for parameter in (ctx.norm_weight, ctx.norm_bias, ctx.bias)]
        outputs = output_gradient, residual_gradient, *sums, *total.shape
        native.call("dropout_add_norm_backward", *inputs, *outputs, *ctx.dropout)
        return _backward(ctx, output_gradient, x, ctx.weight), None, None, residual_gradient, None, None, None, None
