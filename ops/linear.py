"""Linear layers, alone and with what follows them: PyTorch's, and on the CPU with fewer passes over memory. `float8()`
makes them float8.

Shape letters: T tokens (any leading dimensions), I input features, O output features.
"""

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.float8 import float8_linear, is_float8
from ops.ipu import is_lowering, matmul_memory
from ops.native import add_product, call, draw_seed, gradient_of, is_native, product, product_transposed

__all__ = [
    "linear_dropout_add_norm",
    "linear_dropout_add_norm_plain",
    "linear_gelu",
    "linear_gelu_plain",
    "linears",
    "linears_plain",
]


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """Several linear layers of the same input: x [T, I], weights of [O, I], biases of [O] -> as many [T, O]."""
    if _is_native(x, parameters=(*weights, *biases)):
        outputs = _Linears.apply(x.flatten(0, -2), len(weights), *weights, *biases)
        return tuple(output.view(x.shape[:-1] + output.shape[-1:]) for output in outputs)
    return linears_plain(x, weights, biases)


def linears_plain(x, weights, biases) -> Tuple[torch.Tensor, ...]:
    """The same as one product of the parameters side by side."""
    product = _linear(x, torch.cat(tuple(weights)), torch.cat(tuple(biases)), "query_key_value")
    return product.split([len(weight) for weight in weights], dim=-1)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: str = "") -> torch.Tensor:
    """GELU (the exact one, arXiv 1606.08415) of a linear layer: x [T, I], weight [O, I], bias [O] -> [T, O]. `name` is
    the product's in ops.ipu.MATMULS."""
    if _is_native(x, parameters=(weight, bias)):
        return _LinearGelu.apply(x.flatten(0, -2), weight, bias).view(x.shape[:-1] + weight.shape[:1])
    return linear_gelu_plain(x, weight, bias, name)


def linear_gelu_plain(x, weight, bias, name="") -> torch.Tensor:
    """The same in PyTorch's operations."""
    return F.gelu(_linear(x, weight, bias, name))


def linear_dropout_add_norm(
    x, weight, bias, residual, norm_weight, norm_bias, eps: float, dropout: float, name: str = ""
) -> torch.Tensor:
    """LayerNorm(dropout(linear(x)) + residual): x [T, I], weight [O, I], the biases and norm_weight [O], residual [T,
    O] -> [T, O].

    `dropout` is the probability that an element is dropped: 0 where the model is not in training. `name` is the
    product's in ops.ipu.MATMULS.
    """
    if _is_native(x, residual, parameters=(weight, bias, norm_weight, norm_bias)):
        normal = _LinearDropoutAddNorm.apply(
            x.flatten(0, -2), weight, bias, residual.flatten(0, -2).contiguous(), norm_weight, norm_bias, eps, dropout
        )
        return normal.view(residual.shape)
    return linear_dropout_add_norm_plain(x, weight, bias, residual, norm_weight, norm_bias, eps, dropout, name)


def linear_dropout_add_norm_plain(
    x, weight, bias, residual, norm_weight, norm_bias, eps, dropout, name=""
) -> torch.Tensor:
    """The same in PyTorch's operations."""
    product = _linear(x, weight, bias, name)
    return F.layer_norm(
        (F.dropout(product, dropout) if dropout else product) + residual, norm_weight.shape, norm_weight, norm_bias, eps
    )


def _is_native(*tensors: torch.Tensor, parameters) -> bool:
    return not is_float8() and is_native(*tensors, parameters=parameters)


def _linear(x, weight, bias, name) -> torch.Tensor:
    if is_lowering():
        return matmul_memory(x @ weight.t(), name) + bias
    return (float8_linear if is_float8() else F.linear)(x, weight, bias)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, *parameters):
        ctx.save_for_backward(x)
        ctx.weights, ctx.biases = parameters[:count], parameters[count:]
        return tuple(product(x, weight, bias) for weight, bias in zip(ctx.weights, ctx.biases))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        x_gradient = None
        for gradient, weight, bias in zip(gradients, ctx.weights, ctx.biases):
            add_product(weight, gradient, x)
            gradient_of(bias).add_(gradient.sum(dim=0))
            if ctx.needs_input_grad[0]:
                x_gradient = (
                    product_transposed(gradient, weight) if x_gradient is None else x_gradient.addmm_(gradient, weight)
                )
        return (x_gradient, None) + (None,) * 2 * len(gradients)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        before = product(x, weight, bias)
        ctx.save_for_backward(x, before)
        ctx.weight, ctx.bias = weight, bias
        after = torch.empty_like(before)
        call("gelu_forward", before, after, before.numel())
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, before = ctx.saved_tensors
        before_gradient = torch.empty_like(before)
        call("gelu_backward", gradient.contiguous(), before, before_gradient, gradient_of(ctx.bias), *before.shape)
        add_product(ctx.weight, before_gradient, x)
        return product_transposed(before_gradient, ctx.weight) if ctx.needs_input_grad[0] else None, None, None


class _LinearDropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm_weight, norm_bias, eps, dropout):
        total = product(x, weight, bias)  # becomes what is normalised
        normal, statistics = torch.empty_like(total), total.new_empty(len(total), 2)
        ctx.seed, ctx.dropout = draw_seed() if dropout else 0, float(dropout)
        call(
            "dropout_add_norm_forward",
            total,
            residual,
            norm_weight,
            norm_bias,
            normal,
            statistics,
            *total.shape,
            eps,
            ctx.dropout,
            ctx.seed,
        )
        ctx.save_for_backward(x, total, statistics)
        ctx.weight, ctx.bias, ctx.norm_weight, ctx.norm_bias = weight, bias, norm_weight, norm_bias
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, total, statistics = ctx.saved_tensors
        product_gradient, residual_gradient = torch.empty_like(total), torch.empty_like(total)
        call(
            "dropout_add_norm_backward",
            gradient.contiguous(),
            total,
            statistics,
            ctx.norm_weight,
            product_gradient,
            residual_gradient,
            gradient_of(ctx.norm_weight),
            gradient_of(ctx.norm_bias),
            gradient_of(ctx.bias),
            *total.shape,
            ctx.dropout,
            ctx.seed,
        )
        add_product(ctx.weight, product_gradient, x)
        x_gradient = product_transposed(product_gradient, ctx.weight) if ctx.needs_input_grad[0] else None
        return x_gradient, None, None, residual_gradient, None, None, None, None
