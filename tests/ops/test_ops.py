"""Each fast form of an operation against its plain one, on fresh random inputs."""

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F

from ops.attention import CuSeqlens, SampleIds, SampleMask, attention, attention_plain, for_layers, same_sample_mask
from ops.gather import ONE_HOT_ROWS, _EmbedOneHot, embed, gather_tokens, gather_tokens_one_hot
from ops.ipu import (
    block,
    is_lowering,
    lowering,
    mark_loss,
    matmul_memory,
    no_outline,
    recompute_from,
    serialized_matmul,
)
from ops.linear_cross_entropy import _part_bytes, linear_cross_entropy, linear_cross_entropy_plain
from tests.cuda import on_cuda


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(output, inputs, direction):
    """The gradients of sum(output * direction), also of what the operation adds to `.grad` in place."""
    for tensor in inputs:
        tensor.grad = None
    output.backward(direction)
    return [tensor.grad for tensor in inputs]


def to_heads(tensor, heads):
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("rows, heads, length, size", [(2, 3, 17, 8), (4, 2, 128, 64), (1, 12, 512, 64)])
def test_attention_forms_agree_on_rows(rows, heads, length, size):
    inputs = [torch.randn(rows, length, heads * size, requires_grad=True) for _ in range(3)]
    mask = same_sample_mask(torch.randint(0, 4, (rows, length)).sort(1).values)
    plain = attention_plain(*[to_heads(tensor, heads) for tensor in inputs], mask, 0.0).transpose(1, 2).flatten(2)
    direction = torch.randn_like(plain)
    expected = gradients(plain, inputs, direction)
    fused = attention(*inputs, SampleMask(mask), heads, 0.0)
    assert relative_error(fused, plain) < 1e-5
    for fast, slow in zip(gradients(fused, inputs, direction), expected):
        assert relative_error(fast, slow) < 1e-5


@pytest.mark.parametrize("form", ["rows", "lowered"])
def test_attention_drops_the_share_of_weights_that_it_is_told_to(form):
    q, k, v = torch.zeros(1, 256, 8), torch.zeros(1, 256, 8), torch.ones(1, 256, 8)
    with lowering() if form == "lowered" else contextlib.nullcontext():
        segments = for_layers(SampleIds(torch.ones(1, 256, dtype=torch.int32)), torch.float32)
        dropped = attention(q, k, v, segments, 1, 0.25)
        assert dropped.std() > 0.01 and abs(dropped.mean() - 1) < 0.02  # each token's weights sum to about 1, not to 1
        assert torch.allclose(attention(q, k, v, segments, 1, 0.0), v)


def test_layers_take_a_mask_and_on_the_ipu_ids_of_the_hidden_states_type():
    ids, flat = SampleIds(torch.tensor([[1, 1, 2, 0]], dtype=torch.int32)), CuSeqlens(torch.tensor([0, 2, 3]), 2)
    mask = for_layers(ids, torch.float16)
    assert isinstance(mask, SampleMask) and torch.equal(mask.mask, same_sample_mask(ids.ids))
    with lowering():
        sent = for_layers(ids, torch.float16)
    assert isinstance(sent, SampleIds) and sent.ids.dtype == torch.float16 and torch.equal(sent.ids, ids.ids.half())
    assert for_layers(flat, torch.float16) is flat and for_layers(mask, torch.float16) is mask


def test_gather_forms_agree():
    hidden = torch.randn(5, 40, 16, requires_grad=True)
    positions = torch.randint(0, 40, (5, 7), dtype=torch.int32)
    gathered, expected = gather_tokens(hidden, positions), gather_tokens_one_hot(hidden, positions)
    assert torch.equal(gathered, expected) and torch.equal(gathered[3, 2], hidden[3, positions[3, 2]])
    direction = torch.randn_like(gathered)
    assert torch.allclose(
        torch.autograd.grad(gathered, hidden, direction)[0],
        torch.autograd.grad(expected, hidden, direction)[0],
        atol=1e-6,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("rows, shape", [(2, (5000,)), (37, (3, 50)), (ONE_HOT_ROWS, (7,))])
def test_an_embeddings_gradient_as_a_one_hot_product_is_the_gathers(device, dtype, tolerance, rows, shape):
    weight, ids = torch.randn(rows, 24), torch.randint(rows, shape, dtype=torch.int32)
    direction = torch.randn(*shape, 24).to(dtype)
    exact = weight.double().requires_grad_()
    expected = F.embedding(ids, exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, direction.double())
    fast = weight.to(device, dtype).requires_grad_()
    way = embed if device == "cuda" else _EmbedOneHot.apply
    found = way(ids.to(device), fast)
    assert torch.equal(found.cpu(), expected.to(dtype))
    (gradient,) = torch.autograd.grad(found, fast, direction.to(device))
    assert gradient.shape == weight.shape and gradient.dtype == dtype
    assert (gradient.cpu().double() - expected_gradient).norm() < tolerance * expected_gradient.norm()
    assert way is not embed or found.grad_fn.name() == "_EmbedOneHotBackward"


@pytest.mark.parametrize("gigabytes, parts", [(16, 4), (24, 3), (80, 1), (141, 1)])
def test_the_logits_of_a_part_are_a_fortieth_of_the_card_and_at_most_two_gigabytes(monkeypatch, gigabytes, parts):
    card = types.SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    tokens = 20 * 1076  # of phase 1's micro-batch on a large card, in bfloat16
    assert -(-2 * tokens * 30522 // _part_bytes(torch.device("cuda"))) == parts
    assert _part_bytes(torch.device("cuda")) <= 2**31


def test_products_of_bfloat16_add_up_in_float32_where_torch_has_it():
    a, total = torch.empty(8, 4, device="meta", dtype=torch.bfloat16), torch.empty(4, 4, device="meta")
    assert torch.mm(a.t(), a, out_dtype=torch.float32).dtype == torch.float32
    assert torch.addmm(total, a.t(), a, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("factor", [None, 1, 2, 3, 6, 100])
@pytest.mark.parametrize("tokens, size, vocab", [(60, 32, 501), (7, 16, 97)])
@pytest.mark.parametrize("kernels", [True, False])
def test_serialized_linear_cross_entropy_agrees_with_the_plain_one(monkeypatch, kernels, factor, tokens, size, vocab):
    if not kernels:
        monkeypatch.setattr("ops.linear_cross_entropy.is_native", lambda *tensors, **options: False)
    inputs = [
        torch.randn(tokens, size, requires_grad=True),
        torch.randn(vocab, size, requires_grad=True),
        torch.randn(vocab, requires_grad=True),
    ]
    labels, weights = torch.randint(0, vocab, (tokens,)).int(), torch.rand(tokens) * (torch.rand(tokens) > 0.3)
    loss, correct = linear_cross_entropy(*inputs, labels, weights, factor)
    expected, expected_correct = linear_cross_entropy_plain(*inputs, labels, weights)
    assert torch.isclose(loss, expected, rtol=1e-6) and torch.isclose(correct, expected_correct)
    expected_gradients = gradients(expected, inputs, torch.tensor(3.0))
    for fast, slow in zip(gradients(loss, inputs, torch.tensor(3.0)), expected_gradients):
        assert relative_error(fast, slow) < 1e-5
    with torch.no_grad():
        assert torch.isclose(linear_cross_entropy(*inputs, labels, weights, factor)[0], expected, rtol=1e-6)


def test_serialized_linear_cross_entropy_in_bfloat16_stays_within_its_rounding():
    inputs = [
        torch.randn(64, 128, requires_grad=True),
        torch.randn(300, 128, requires_grad=True) / 11,
        torch.randn(300, requires_grad=True),
    ]
    labels, weights = torch.randint(0, 300, (64,)), torch.rand(64) / 32
    expected, _ = linear_cross_entropy_plain(*inputs, labels, weights)
    loss, _ = linear_cross_entropy(*[tensor.bfloat16() for tensor in inputs], labels, weights, 3)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-2 * expected
    for fast, slow in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert fast.dtype == torch.float32 and relative_error(fast, slow) < 2e-2


class Recorder:
    """Takes down what the graph tells PopTorch."""

    class MatMulSerializationMode:
        OutputChannels = "output channels"

    def __init__(self):
        self.calls = []

    def annotate(self, *call):
        self.calls.append(call)
        return contextlib.nullcontext()

    def Block(self, user_id=None, ipu_id=None):
        return self.annotate("block", user_id, ipu_id)

    def Attribute(self, **values):
        return self.annotate("attribute", values)

    def recomputationCheckpoint(self, tensor):
        self.annotate("checkpoint")
        return tensor

    def set_available_memory(self, tensor, available_memory_proportion):
        self.annotate("memory", available_memory_proportion)
        return tensor

    def serializedMatMul(self, lhs, rhs, mode, factor=0):
        self.annotate("serialized", mode, factor)
        return lhs @ rhs

    def identity_loss(self, x, reduction):
        self.annotate("loss", reduction)
        return x


def test_annotations_go_to_poptorch_where_it_compiles_and_are_free_elsewhere():
    x, weight = torch.randn(3, 4), torch.randn(6, 4)

    def annotated():
        with block("layer0"), no_outline("embeddings"):
            product = matmul_memory(recompute_from(x) @ x.t(), "attention_scores")
            return (
                product,
                matmul_memory(product, "output"),
                serialized_matmul(x, weight, 2),
                serialized_matmul(x, weight, 1),
                mark_loss(x[0, 0]),
            )

    plain, recorder = annotated(), Recorder()
    assert not is_lowering()
    with lowering(recorder, {"layer0": 1}, loss_factor=8.0, proportions={"attention_scores": 0.1}):
        assert is_lowering()
        lowered = annotated()
    assert recorder.calls == [
        ("block", "layer0", 1),
        ("attribute", {"__outline": {"layer": "embeddings"}}),
        ("checkpoint",),
        ("memory", 0.1),
        ("serialized", "output channels", 2),
        ("loss", "none"),
    ]
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], lowered)) and lowered[4] == 8 * plain[4]
    assert torch.allclose(lowered[2], x @ weight.t(), rtol=1e-6)


def test_annotations_that_name_what_is_not_there_are_refused():
    x = torch.randn(3, 4)
    assert matmul_memory(x, None) is x and matmul_memory(x, "") is x
    with pytest.raises(ValueError, match="'outptu'.*attention_output"):
        matmul_memory(x, "outptu")
    with lowering(Recorder(), {"layer0": 1}), pytest.raises(ValueError, match="layer1.*layer0"):
        block("layer1")


def test_without_recomputation_nothing_is_marked_for_it():
    recorder, x = Recorder(), torch.randn(3)
    with lowering(recorder, recompute=False):
        assert recompute_from(x) is x
    assert not recorder.calls


@pytest.mark.parametrize("factor", [1, 3])
def test_the_linear_cross_entropy_that_the_ipu_lowers_agrees_with_the_plain_one(factor):
    inputs = [
        torch.randn(20, 16, requires_grad=True),
        torch.randn(99, 16, requires_grad=True),
        torch.randn(99, requires_grad=True),
    ]
    labels, weights = torch.randint(0, 99, (20,), dtype=torch.int32), torch.rand(20) * (torch.rand(20) > 0.3)
    expected, expected_correct = linear_cross_entropy_plain(*inputs, labels, weights)
    with lowering(Recorder()):
        loss, correct = linear_cross_entropy(*inputs, labels, weights, factor)
    assert torch.isclose(loss, expected, rtol=1e-6) and torch.isclose(correct, expected_correct)
    for fast, slow in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert relative_error(fast, slow) < 1e-5
