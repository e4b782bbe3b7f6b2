"""Each fast form of an operation against its plain one, on fresh random inputs."""

import sys
import types

import pytest
import torch

from ops.attention import attention, attention_plain, same_sample_mask
from ops.gather import gather_tokens, gather_tokens_one_hot
from ops.ipu import block, is_lowering, lowering, recompute_from
from ops.mlm_loss import mlm_loss, mlm_loss_plain


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows, heads, length, size", [(2, 3, 17, 8), (4, 2, 128, 64), (1, 12, 512, 64)])
def test_attention_forms_agree(rows, heads, length, size):
    q, k, v = (torch.randn(rows, heads, length, size, requires_grad=True) for _ in range(3))
    mask = same_sample_mask(torch.randint(0, 4, (rows, length)).sort(1).values)
    out, plain = attention(q, k, v, mask, 0.0), attention_plain(q, k, v, mask, 0.0)
    direction = torch.randn_like(out)
    assert relative_error(out, plain) < 1e-5
    for fast, slow in zip(torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(plain, (q, k, v), direction)):
        assert relative_error(fast, slow) < 1e-5


def test_attention_drops_the_share_of_weights_that_it_is_told_to():
    q, k = torch.zeros(1, 1, 256, 8), torch.zeros(1, 1, 256, 8)
    v = torch.ones(1, 1, 256, 8)
    mask = same_sample_mask(torch.ones(1, 256))
    for form in (attention, attention_plain):
        torch.manual_seed(0)
        dropped = form(q, k, v, mask, 0.25)
        assert dropped.std() > 0.01 and abs(dropped.mean() - 1) < 0.02, form  # each token's weights sum to about 1, not to 1
        assert torch.allclose(form(q, k, v, mask, 0.0), v)


def test_gather_forms_agree():
    hidden = torch.randn(5, 40, 16, requires_grad=True)
    positions = torch.randint(0, 40, (5, 7), dtype=torch.int32)
    found, expected = gather_tokens(hidden, positions), gather_tokens_one_hot(hidden, positions)
    assert torch.equal(found, expected) and torch.equal(found[3, 2], hidden[3, positions[3, 2]])
    direction = torch.randn_like(found)
    assert torch.allclose(torch.autograd.grad(found, hidden, direction)[0], torch.autograd.grad(expected, hidden, direction)[0], atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("tokens, size, vocab", [(60, 32, 501), (7, 16, 97)])
def test_serialized_mlm_loss_agrees_with_the_plain_one(factor, tokens, size, vocab):
    inputs = [torch.randn(tokens, size, requires_grad=True), torch.randn(vocab, size, requires_grad=True),
              torch.randn(vocab, requires_grad=True)]
    labels, weights = torch.randint(0, vocab, (tokens,), dtype=torch.int32), torch.rand(tokens) * (torch.rand(tokens) > 0.3)
    (loss, correct), (expected, expected_correct) = mlm_loss(*inputs, labels, weights, factor), mlm_loss_plain(*inputs, labels, weights)
    assert torch.isclose(loss, expected, rtol=1e-6) and torch.isclose(correct, expected_correct)
    for fast, slow in zip(torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, inputs)):
        assert relative_error(fast, slow) < 1e-5
    with torch.no_grad():
        assert torch.isclose(mlm_loss(*inputs, labels, weights, factor)[0], expected, rtol=1e-6)


def test_serialized_mlm_loss_under_bfloat16_autocast_stays_within_its_rounding():
    inputs = [torch.randn(64, 128, requires_grad=True), torch.randn(300, 128, requires_grad=True) / 11, torch.randn(300, requires_grad=True)]
    labels, weights = torch.randint(0, 300, (64,)), torch.rand(64) / 32
    expected, _ = mlm_loss_plain(*inputs, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mlm_loss(*inputs, labels, weights, 3)
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-2 * expected
    for fast, slow in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert fast.dtype == torch.float32 and relative_error(fast, slow) < 2e-2


def test_blocks_are_poptorchs_under_poptorch_and_free_elsewhere(monkeypatch):
    opened, kept = [], []

    class Block:
        def __init__(self, user_id=None, ipu_id=None):
            self.where = (user_id, ipu_id)

        def __enter__(self):
            opened.append(self.where)

        def __exit__(self, *error):
            pass

    poptorch = types.SimpleNamespace(Block=Block, recomputationCheckpoint=lambda tensor: kept.append(tensor) or tensor)
    monkeypatch.setitem(sys.modules, "poptorch", poptorch)
    hidden = torch.ones(1)
    with block("layer0", 1):
        assert recompute_from(hidden) is hidden
    assert not opened and not kept and not is_lowering()
    with lowering(), block("layer0", 1):
        assert recompute_from(hidden) is hidden
    assert opened == [("layer0", 1)] and len(kept) == 1
