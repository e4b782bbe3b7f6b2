"""The C++ kernels in both types against plain PyTorch in float64, on fresh random inputs, dropout included: its mask is
read from the kernel itself."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ops import native as native_module
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
from ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from ops.native import add_weight_grad, call, is_native, multiplies_bfloat16, native, packed_weights
from ops.norm import layer_norm
from tests import ROOT
from tests.ops.test_ops import gradients, relative_error

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Norm of the error by norm of the tensor. Inputs, outputs and what is in between are rounded to 8 bits in bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def mask_of(shape, p, seed, dtype=torch.float32):
    """What dropout multiplies a tensor of this shape by, drawn after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return (dropout(torch.ones(shape, dtype=dtype), p) != 0).double() / (1 - p)


def random(*shape, dtype=torch.float32, std=1.0, parameter=False):
    """A leaf that wants gradients; a parameter of bfloat16 has a float32 master."""
    tensor = (std * torch.randn(shape)).to(dtype).requires_grad_()
    if parameter and dtype != torch.float32:
        tensor.master = tensor.detach().float().requires_grad_()
    return tensor


def doubles(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_agree(fast, slow, tensors, tolerance=1e-5):
    """`fast`, made of `tensors`, and its gradients are those of `slow`, a function of the same in float64."""
    inputs = doubles(tensors)
    expected = slow(*inputs)
    assert relative_error(fast, expected) < tolerance
    direction = torch.randn_like(fast)
    wanted = gradients(expected, inputs, direction.double())
    fast.backward(direction)
    for tensor, gradient in zip(tensors, wanted):
        leaf = getattr(tensor, "master", tensor)
        assert relative_error(leaf.grad, gradient) < tolerance
        leaf.grad = None


@TYPES
def test_the_kernels_are_built_here(dtype):
    assert native(dtype) is not None and is_native(torch.zeros(1, dtype=dtype))
    assert not is_native(torch.zeros(1, dtype=torch.float64)) and not is_native(
        torch.zeros(1), torch.zeros(1).bfloat16()
    )


def test_a_bfloat16_parameter_without_a_master_takes_pytorchs_operations():
    x, weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in ((9, 6), (8, 6), (8,)))
    assert is_native(x) and not is_native(x, parameters=(weight, bias))
    linear(x, weight, bias).sum().backward()
    assert weight.grad.dtype == torch.bfloat16


@TYPES
@pytest.mark.parametrize("tokens, width, out", [(64, 1, 16), (1, 17, 50), (37, 24, 40), (130, 64, 200), (2051, 70, 9)])
@pytest.mark.parametrize("rows", [False, True])
def test_linear_layers_agree(tokens, width, out, rows, dtype):
    x = random(*(2, tokens, width) if rows else (tokens, width), dtype=dtype)
    shapes = (out, width), (out, width), (out,), (out,)
    parameters = [random(*shape, dtype=dtype, std=width**-0.5, parameter=True) for shape in shapes]

    def both(form):
        return lambda x, *parameters: torch.cat(form(x, parameters[:2], parameters[2:]), -1)

    assert_agree(both(linears)(x, *parameters), both(linears_plain), [x] + parameters, TOLERANCE[dtype])
    inputs = [x, parameters[0], parameters[2]]
    assert_agree(linear(*inputs), linear_plain, inputs, TOLERANCE[dtype])
    assert_agree(linear_gelu(*inputs), linear_gelu_plain, inputs, TOLERANCE[dtype])


@TYPES
def test_weights_packed_for_several_products_give_what_they_give_unpacked(dtype):
    x, weight = random(50, 64, dtype=dtype), random(96, 64, dtype=dtype, std=0.1, parameter=True)
    bias = random(96, dtype=dtype, parameter=True)
    with packed_weights(uses=4):
        for tokens in (50, 50, 7, 33):  # packed for the first number of tokens, right for any
            inputs = [x[:tokens].detach().requires_grad_(), weight, bias]
            assert_agree(linear(*inputs), linear_plain, inputs, TOLERANCE[dtype])
    with torch.no_grad():
        weight.mul_(2.0)
    assert_agree(linear(x, weight, bias), linear_plain, [x, weight, bias], TOLERANCE[dtype])


def test_where_there_are_tiles_onednn_makes_the_gradients_of_bfloat16_weights(monkeypatch):
    monkeypatch.setattr(native_module, "multiplies_in_tiles", lambda: True)
    monkeypatch.setattr(native_module, "call", lambda name, *_: pytest.fail(name))
    x, weight = torch.randn(40, 24).bfloat16(), random(16, 24, dtype=torch.bfloat16, parameter=True)
    gradient = torch.randn(40, 16).bfloat16()
    for _ in range(2):
        native_module.accumulate_weight_grad(weight, gradient, x)
    assert relative_error(weight.master.grad, 2 * gradient.double().t() @ x.double()) < 1e-2


def test_gradients_add_to_those_that_are_there_and_frozen_parameters_get_none():
    x, weight, bias = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.randn(7)
    linear_gelu(x, weight, bias).sum().backward()
    once = weight.grad.clone()
    linear_gelu(x, weight, bias).sum().backward()
    assert torch.allclose(weight.grad, 2 * once) and bias.grad is None and x.grad is None


def test_what_is_computed_from_parameters_takes_pytorchs_operations():
    x, weight, bias = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    assert_agree(linear_gelu(x, 2 * weight, bias), lambda w, b: linear_gelu_plain(x.double(), 2 * w, b), [weight, bias])


def test_other_types_are_refused_not_misread():
    segments, rows = cu_seqlens_of([4, 5]), [torch.randn(9, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="float64"):
        attention(*[tensor.double() for tensor in rows], segments, 2, 0.0)
    with pytest.raises(ValueError, match="even heads"):
        attention(*[torch.randn(9, 9).bfloat16() for _ in range(3)], segments, 3, 0.0)
    with pytest.raises(ValueError, match="int64"):
        attention(*rows, segments._replace(cu_seqlens=segments.cu_seqlens.long()), 2, 0.0)
    with pytest.raises(ValueError, match="bfloat16"):
        call("gelu_forward", rows[0], rows[1].bfloat16(), 9)


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


@TYPES
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("tokens, width, out", [(1, 3, 8), (50, 64, 33), (128, 40, 96)])
def test_linear_dropout_add_norm_agrees(tokens, width, out, p, dtype):
    x, residual = random(tokens, width, dtype=dtype), random(tokens, out, dtype=dtype)
    shapes = (out, width), (out,), (out,), (out,)
    parameters = [random(*shape, dtype=dtype, parameter=True) for shape in shapes]
    mask = mask_of((tokens, out), p, 3, dtype)

    def exact(x, weight, bias, residual, norm_weight, norm_bias):
        return F.layer_norm(F.linear(x, weight, bias) * mask + residual, (out,), norm_weight, norm_bias, 1e-3)

    inputs = [x, *parameters[:2], residual, *parameters[2:]]
    torch.manual_seed(3)
    assert_agree(linear_dropout_add_norm(*inputs, 1e-3, p), exact, inputs, TOLERANCE[dtype])


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
            weights = weights * mask[start : start + n, :, :n].transpose(0, 1).to(weights.dtype)
        parts.append((weights @ v).transpose(0, 1).flatten(1))
        start += n
    return torch.cat(parts)


def cu_seqlens_of(lengths):
    return CuSeqlens(torch.tensor([0] + list(lengths)).cumsum(0).int(), max(lengths))


@TYPES
@pytest.mark.parametrize("lengths", [[2, 1], [5, 1, 17, 16], [128, 100, 49, 48, 47], [512, 3, 370]])
@pytest.mark.parametrize("heads, size", [(2, 64), (3, 8), (1, 20)])
def test_unpadded_attention_agrees(lengths, heads, size, dtype):
    inputs = [random(sum(lengths), heads * size, dtype=dtype) for _ in range(3)]
    fast = attention(*inputs, cu_seqlens_of(lengths), heads, 0.0)
    assert_agree(fast, lambda *tensors: attention_with_mask(*tensors, lengths, heads), inputs, TOLERANCE[dtype])


def test_unpadded_attention_leaves_out_samples_without_tokens():
    inputs = [torch.randn(9, 16) for _ in range(3)]
    segments = CuSeqlens(torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32), 5)
    assert relative_error(attention(*inputs, segments, 2, 0.0), attention_with_mask(*inputs, [4, 5], 2)) < 1e-5


@TYPES
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_unpadded_attention_agrees_with_dropout(p, dtype):
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
    inputs = [random(tokens, heads * size, dtype=dtype) for _ in range(3)]
    torch.manual_seed(5)
    fast = attention(*inputs, segments, heads, p)  # masks do not depend on the type
    assert_agree(fast, lambda *tensors: attention_with_mask(*tensors, lengths, heads, mask), inputs, TOLERANCE[dtype])


def test_dropout_masks_are_independent_of_each_other():
    p, shape = 0.1, (512, 768)
    masks = [(mask_of(shape, p, seed) == 0).double() for seed in (0, 1)]
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


@TYPES
def test_embedding_gradients_are_added_in_place(dtype):
    weight = random(50, 8, dtype=dtype, parameter=True)
    ids = torch.randint(0, 50, (4, 30), dtype=torch.int32)
    assert_agree(embed(ids, weight), lambda weight: F.embedding(ids, weight), [weight], TOLERANCE[dtype])


def test_gradients_of_bfloat16_parameters_are_summed_in_float32_where_there_is_no_master():
    inputs = [random(*shape, dtype=torch.bfloat16) for shape in ((50, 8), (8,), (8,))]
    ids, exact = (torch.rand(5000) ** 4 * 50).int(), doubles(inputs)
    direction = 1 + torch.randn(5000, 8).bfloat16()
    expected = F.layer_norm(F.embedding(ids, exact[0]), (8,), *exact[1:], 1e-3)
    wanted = gradients(expected, exact, direction.double())
    for tensor, gradient in zip(
        gradients(layer_norm(embed(ids, inputs[0]), *inputs[1:], 1e-3), inputs, direction), wanted
    ):
        assert tensor.dtype == torch.bfloat16 and relative_error(tensor, gradient) < 1e-2


@pytest.mark.parametrize("factor", [None, 1, 3])
def test_the_mlm_loss_agrees_in_bfloat16(factor):
    hidden = random(60, 32, dtype=torch.bfloat16)
    decoder, bias = (random(*shape, dtype=torch.bfloat16, parameter=True) for shape in ((501, 32), (501,)))
    labels, weights = torch.randint(0, 501, (60,)).int(), torch.rand(60) / 60
    loss, correct = linear_cross_entropy(hidden, decoder, bias, labels, weights, factor)
    logits = F.linear(hidden, decoder, bias)  # of equal highest logits, which are common in bfloat16, the first counts
    assert torch.isclose(correct, (weights * (logits.argmax(-1) == labels)).sum())
    inputs = [hidden, decoder, bias]
    assert_agree(loss, lambda *exact: linear_cross_entropy_plain(*exact, labels, weights.double())[0], inputs, 1e-2)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, decoder, bias, labels, weights, factor)
    assert torch.isclose(evaluated[0], loss, rtol=1e-2) and torch.isclose(evaluated[1], correct)


def test_of_equal_highest_logits_the_first_counts():
    logits = torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0]])
    for dtype in (torch.float32, torch.bfloat16):
        correct = torch.empty(2)
        labels, weights = torch.tensor([2, 0]), torch.ones(2)
        call("cross_entropy", logits.clone().to(dtype), labels, weights, torch.empty(2), correct, 2, 3)
        assert correct.tolist() == [0.0, 1.0]


def test_rounding_to_bfloat16_is_pytorchs_for_all_numbers():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[None]
    torch.manual_seed(3)
    y = dropout(x, 0.1)
    kept = mask_of(x.shape, 0.1, 3, torch.bfloat16) != 0
    expected = (x.float() * torch.tensor(1 / 0.9)).bfloat16()
    assert kept.float().mean() > 0.89
    assert torch.equal(y[kept].isnan(), expected[kept].isnan())
    assert torch.equal(y[kept].nan_to_num(7.0, 8.0, 9.0), expected[kept].nan_to_num(7.0, 8.0, 9.0))


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


@TYPES
@pytest.mark.parametrize("width", [1, 20, 64, 70])
def test_weight_gradients_are_written_where_they_belong_and_nowhere_else(width, dtype):
    tokens, outputs = 40, 50
    gradient, x = torch.randn(tokens, outputs).to(dtype), torch.randn(tokens, width).to(dtype)
    gradient[0, -1] = math.inf  # what is multiplied by 0 shows
    guarded = torch.ones(outputs * width + 64)
    add_weight_grad(guarded[: outputs * width].view(outputs, width), gradient, x)
    assert torch.equal(guarded[outputs * width :], torch.ones(64))
    expected = 1 + gradient[:, :-1].double().t() @ x.double()
    assert relative_error(guarded[: (outputs - 1) * width].view(-1, width), expected) < TOLERANCE[dtype]
    assert not guarded[(outputs - 1) * width : outputs * width].isfinite().any()


@pytest.mark.parametrize("tokens", [20, 200])
def test_the_mlm_loss_scales_its_gradients_however_many_tokens_there_are(tokens):
    inputs = [torch.randn(tokens, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True), torch.randn(97)]
    inputs[2].requires_grad_()
    labels, weights = torch.randint(0, 97, (tokens,)), torch.rand(tokens)
    loss = linear_cross_entropy(*inputs, labels, weights, 3)[0]
    exact = lambda *tensors: 0.5 * linear_cross_entropy_plain(*tensors, labels, weights.double())[0]  # noqa: E731
    assert_agree(0.5 * loss, exact, inputs)


@pytest.mark.parametrize("limit, expected", [("AVX2", False), ("AVX512_CORE", False), ("avx512_core_bf16", True)])
def test_bfloat16_is_native_only_where_onednn_may_multiply_it(monkeypatch, limit, expected):
    if not multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bfloat16() == expected


def test_where_onednn_has_no_bfloat16_products_pytorch_has(monkeypatch):
    code = (
        "import torch\nfrom ops.native import linear, linear_input_grad, multiplies_bfloat16, packed_weights\n"
        "x, w = torch.randn(8, 16).bfloat16(), torch.randn(32, 16).bfloat16()\n"
        "with packed_weights(9): y = linear(x, w)\n"
        "assert not multiplies_bfloat16() and (y.float() - x.float() @ w.float().t()).abs().max() < 0.1\n"
    )
    environment = dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
