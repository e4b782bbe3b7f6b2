"""The C++ kernels against plain PyTorch, on fresh random inputs, dropout included: its mask is read from the kernel
itself."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ops.attention import CuSeqlens, attention
from ops.dropout import dropout
from ops.gather import embed
from ops.linear import (
    linear,
    linear_dropout_add_norm,
    linear_gelu,
    linear_gelu_plain,
    linear_plain,
    linears,
    linears_plain,
)
from ops.native import call, is_native, native
from tests import ROOT
from tests.ops.test_ops import gradients, relative_error


def mask_of(shape, p, seed):
    """What dropout multiplies a tensor of this shape by, drawn after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return dropout(torch.ones(shape), p)


def assert_agree(fast, slow, inputs, tolerance=1e-5):
    assert relative_error(fast, slow) < tolerance
    direction = torch.randn_like(slow)
    expected = gradients(slow, inputs, direction)
    for got, wanted in zip(gradients(fast, inputs, direction), expected):
        assert relative_error(got, wanted) < tolerance


def test_the_kernels_are_built_here():
    assert native() is not None and is_native(torch.zeros(1))
    assert not is_native(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens, width, out", [(1, 1, 16), (37, 24, 40), (130, 64, 200)])
@pytest.mark.parametrize("rows", [False, True])
def test_linear_layers_agree(tokens, width, out, rows):
    x = torch.randn((2, tokens, width) if rows else (tokens, width), requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((out, width), (out, width), (out,), (out,))]
    fast, slow = (form(x, parameters[:2], parameters[2:]) for form in (linears, linears_plain))
    assert_agree(fast[0] * fast[1].cos(), slow[0] * slow[1].cos(), [x] + parameters)
    inputs = [x, parameters[0], parameters[2]]
    assert_agree(linear(*inputs), linear_plain(*inputs), inputs)
    assert_agree(linear_gelu(*inputs), linear_gelu_plain(*inputs), inputs)


def test_gradients_add_to_those_that_are_there_and_frozen_parameters_get_none():
    x, weight, bias = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.randn(7)
    linear_gelu(x, weight, bias).sum().backward()
    once = weight.grad.clone()
    linear_gelu(x, weight, bias).sum().backward()
    assert torch.allclose(weight.grad, 2 * once) and bias.grad is None and x.grad is None


def test_what_is_computed_from_parameters_takes_pytorchs_operations():
    x, weight, bias = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    assert_agree(linear_gelu(x, 2 * weight, bias), linear_gelu_plain(x, 2 * weight, bias), [weight, bias])


def test_other_types_are_refused_not_misread():
    segments = cu_seqlens_of([4, 5])
    with pytest.raises(ValueError, match="bfloat16"):
        attention(*[torch.randn(9, 16).bfloat16() for _ in range(3)], segments, 2, 0.0)
    with pytest.raises(ValueError, match="int64"):
        attention(
            *[torch.randn(9, 16) for _ in range(3)], segments._replace(cu_seqlens=segments.cu_seqlens.long()), 2, 0.0
        )


def test_gelu_and_its_derivative_are_right_to_1e_6_everywhere():
    x = torch.cat([torch.linspace(-12, 12, 9601), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])])
    y, gradient, ones = torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    call("gelu_forward", x, y, x.numel())
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    assert (y - expected).abs().div(1 + expected.abs()).max() < 1e-6
    call("gelu_backward", ones, x, gradient, torch.zeros_like(x), 1, len(x))
    assert (gradient - exact.grad).abs().max() < 1e-6
    call("gelu_forward", torch.full((3,), math.nan), y, 3)
    assert y[:3].isnan().all()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("tokens, width, out", [(1, 3, 8), (50, 64, 33), (128, 40, 96)])
def test_linear_dropout_add_norm_agrees(tokens, width, out, p):
    x, residual = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, out, requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((out, width), (out,), (out,), (out,))]
    weight, bias, norm_weight, norm_bias = parameters
    mask = mask_of((tokens, out), p, seed=3)
    torch.manual_seed(3)
    fast = linear_dropout_add_norm(x, weight, bias, residual, norm_weight, norm_bias, 1e-3, p)
    slow = F.layer_norm(F.linear(x, weight, bias) * mask + residual, (out,), norm_weight, norm_bias, 1e-3)
    assert_agree(fast, slow, [x, residual] + parameters)


def test_layer_norm_survives_a_mean_far_from_zero():
    x, identity = torch.randn(20, 64), torch.eye(64)
    normal = linear_dropout_add_norm(
        x, identity, torch.full((64,), 1e3), torch.zeros(20, 64), torch.ones(64), torch.zeros(64), 1e-12, 0.0
    )
    assert (normal - F.layer_norm(x + 1e3, (64,), eps=1e-12)).abs().max() < 1e-3


def attention_with_mask(query, key, value, lengths, heads, mask=None):
    """Sample by sample, in PyTorch's operations; mask: [T, A, longest] factors of the attention weights."""
    parts, start = [], 0
    for n in lengths:
        q, k, v = (
            tensor[start : start + n].unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (query, key, value)
        )
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        if mask is not None:
            weights = weights * mask[start : start + n, :, :n].transpose(0, 1)
        parts.append((weights @ v).transpose(0, 1).flatten(1))
        start += n
    return torch.cat(parts)


def cu_seqlens_of(lengths):
    return CuSeqlens(torch.tensor([0] + list(lengths)).cumsum(0).int(), max(lengths))


@pytest.mark.parametrize("lengths", [[2, 1], [5, 1, 17, 16], [128, 100, 49, 48, 47], [512, 3, 370]])
@pytest.mark.parametrize("heads, size", [(2, 64), (3, 8), (1, 20)])
def test_unpadded_attention_agrees(lengths, heads, size):
    inputs = [torch.randn(sum(lengths), heads * size, requires_grad=True) for _ in range(3)]
    assert_agree(
        attention(*inputs, cu_seqlens_of(lengths), heads, 0.0), attention_with_mask(*inputs, lengths, heads), inputs
    )


def test_unpadded_attention_leaves_out_samples_without_tokens():
    inputs = [torch.randn(9, 16) for _ in range(3)]
    segments = CuSeqlens(torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32), 5)
    assert relative_error(attention(*inputs, segments, 2, 0.0), attention_with_mask(*inputs, [4, 5], 2)) < 1e-5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_unpadded_attention_agrees_with_dropout(p):
    lengths, heads, size = [64, 31, 64, 50], 2, 64
    tokens = sum(lengths)
    # Equal scores and values that are unit vectors: the context is the mask, divided by the length.
    units = torch.cat([torch.eye(n, size) for n in lengths]).repeat(1, heads)
    segments, zeros = cu_seqlens_of(lengths), torch.zeros(tokens, heads * size)
    torch.manual_seed(5)
    context = attention(zeros, zeros, units, segments, heads, p).unflatten(-1, (heads, size))
    mask = context * torch.cat([torch.full((n,), float(n)) for n in lengths])[:, None, None]
    used = torch.cat([(torch.arange(size) < n).expand(n, heads, size) for n in lengths])
    assert abs((mask[used] == 0).float().mean() - p) < 0.02 and torch.allclose(mask.max(), torch.tensor(1 / (1 - p)))
    inputs = [torch.randn(tokens, heads * size, requires_grad=True) for _ in range(3)]
    torch.manual_seed(5)
    assert_agree(attention(*inputs, segments, heads, p), attention_with_mask(*inputs, lengths, heads, mask), inputs)


def test_dropout_masks_are_independent_of_each_other():
    p, shape = 0.1, (512, 768)
    masks = [(mask_of(shape, p, seed) == 0).float() for seed in (0, 1)]
    for mask in masks:
        assert abs(mask.mean() - p) < 4 * math.sqrt(p * (1 - p) / mask.numel())
        assert (mask.mean(dim=0) - p).abs().max() < 6 * math.sqrt(p * (1 - p) / shape[0])
        assert (mask.mean(dim=1) - p).abs().max() < 6 * math.sqrt(p * (1 - p) / shape[1])
        for shift in ((0, 1), (1, 0), (1, 1), (0, 16), (2, -1)):
            assert abs(((mask - p) * (mask.roll(shift, (0, 1)) - p)).mean()) < 6 * p / math.sqrt(mask.numel())
    assert abs(((masks[0] - p) * (masks[1] - p)).mean()) < 6 * p / math.sqrt(masks[0].numel())
    x = torch.randn(30, 40, requires_grad=True)
    torch.manual_seed(7)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0) and torch.allclose(x.grad[x.grad != 0], torch.tensor(1 / 0.7))


def test_embedding_gradients_are_added_in_place():
    weight = torch.randn(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (4, 30), dtype=torch.int32)
    assert_agree(embed(ids, weight), F.embedding(ids, weight), [weight])


def test_without_a_compiler_one_warning_says_so_and_training_goes_on(tmp_path):
    code = (
        "import torch\nfrom ops.native import is_native\nfrom ops.linear import linear_gelu\n"
        "assert not is_native(torch.zeros(1)) and not is_native(torch.zeros(1))\n"
        "print(linear_gelu(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).shape)"
    )
    environment = dict(os.environ, CXX="/nowhere/g++", TORCH_EXTENSIONS_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "[2, 4]" in done.stdout, done.stderr
    assert done.stderr.count("Warning: the C++ kernels cannot be built") == 1 and "CXX" in done.stderr
