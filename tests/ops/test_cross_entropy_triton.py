"""The Triton kernel of the MLM loss: on a GPU where one is there, else in Triton's interpreter, in a process of its
own."""

import os

import pytest
import torch

from ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from tests.cuda import on_cuda
from tests.ops.interpreter import run_in_tritons_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter, which is chosen when triton is imported, would stay for all tests of this process.
on_kernel = [] if INTERPRETED else on_cuda


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def kernel():
    from ops.cross_entropy_triton import cross_entropy

    return cross_entropy


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        pytest.param(torch.float32, 1e-6, marks=on_kernel),
        pytest.param(torch.bfloat16, 6e-3, marks=on_kernel),
        pytest.param(torch.float16, 1e-3, marks=on_kernel),
    ],
)
@pytest.mark.parametrize("tokens, vocab", [(7, 97), (1, 4096), (3, 30522)])
@pytest.mark.parametrize("label_type", [torch.int32, torch.int64])
def test_losses_and_gradients_are_those_of_float64(dtype, tolerance, tokens, vocab, label_type):
    logits = (4 * torch.randn(tokens, vocab, device=DEVICE)).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), dtype=label_type, device=DEVICE)
    labels[0], labels[-1] = 0, vocab - 1
    logits[0, labels[0]] = 100  # right, and far above the others, whose sum must not overflow
    weights = torch.rand(tokens, device=DEVICE) + 0.1
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels.long(), reduction="none")
    (direction,) = torch.autograd.grad((weights * expected).sum(), exact)
    expected_correct = (exact.argmax(dim=-1) == labels).float()

    losses, correct, gradients = kernel()(logits, labels, weights)
    assert gradients.data_ptr() == logits.data_ptr() and gradients.dtype == dtype
    assert losses.dtype == torch.float32 and torch.allclose(losses.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(correct, expected_correct)
    # Element by element too: a block that was left out is small beside the label's gradient.
    assert torch.allclose(gradients.double(), direction, rtol=4 * tolerance, atol=1e-7)
    assert direction.norm() < 1e-6 or relative_error(gradients, direction) < tolerance


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=on_kernel)])
def test_of_equal_highest_logits_the_first_counts(dtype):
    logits = torch.zeros(3, 5000, dtype=dtype, device=DEVICE)
    logits[:, [70, 4500]] = 2.0
    labels, weights = torch.tensor([70, 4500, 3], device=DEVICE), torch.ones(3, device=DEVICE)
    assert kernel()(logits, labels, weights)[1].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "dtype, tolerance",
    [pytest.param(torch.float32, 1e-5, marks=on_kernel), pytest.param(torch.bfloat16, 5e-2, marks=on_kernel)],
)
@pytest.mark.parametrize("factor", [None, 3])
def test_linear_cross_entropy_with_the_kernel_is_the_plain_one(monkeypatch, dtype, tolerance, factor):
    monkeypatch.setattr("ops.linear_cross_entropy._kernel", lambda device: kernel())
    monkeypatch.setattr("ops.linear_cross_entropy.is_native", lambda *tensors, **options: False)
    inputs = [
        torch.randn(20, 32, device=DEVICE, requires_grad=True),
        torch.randn(501, 32, device=DEVICE, requires_grad=True),
        torch.randn(501, device=DEVICE, requires_grad=True),
    ]
    labels = torch.randint(0, 501, (20,), dtype=torch.int32, device=DEVICE)
    weights = torch.rand(20, device=DEVICE) * (torch.rand(20, device=DEVICE) > 0.3)
    expected, expected_correct = linear_cross_entropy_plain(*inputs, labels, weights)
    loss, correct = linear_cross_entropy(*[tensor.to(dtype) for tensor in inputs], labels, weights, factor)
    assert torch.isclose(loss, expected, rtol=tolerance)
    assert dtype == torch.bfloat16 or torch.isclose(correct, expected_correct)
    for fast, slow in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        assert fast.shape == slow.shape and fast.dtype == torch.float32 and relative_error(fast, slow) < tolerance


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel is tested in this process")
def test_the_kernel_in_tritons_interpreter():
    run_in_tritons_interpreter("tests/ops/test_cross_entropy_triton.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab, wide", [(30528, True), (30522, False)])
def test_the_kernel_compiles_for_hopper_and_loads_16_bytes_a_thread_of_a_padded_vocabulary(
    tmp_path, monkeypatch, dtype, vocab, wide
):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.cross_entropy_triton import BLOCK, _cross_entropy_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*" + dtype, "labels": "*i64", "weights": "*fp32", "losses": "*fp32", "correct": "*fp32"}
    names = _cross_entropy_kernel.arg_names
    source = ASTSource(
        _cross_entropy_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index("V"),): vocab, (names.index("BLOCK"),): BLOCK},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert ("ld.global.v4" in code) == ("st.global.v4" in code) == wide
    assert "ld.local" not in code  # no registers spilled
