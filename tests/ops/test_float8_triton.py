"""The Triton kernel that makes float8 of a matrix and its transpose: on a GPU where one is there, else in Triton's
interpreter, in a process of its own."""

import os

import pytest
import torch

from bert.config import ModelConfig
from bert.model.batch import Batch, State
from bert.model.blocks import EncoderLayer
from ops.attention import CuSeqlens
from ops.float8 import _cast, _scale, float8
from tests.cuda import on_cuda
from tests.ops.interpreter import run_in_tritons_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter, which is chosen when triton is imported, would stay for all tests of this process.
on_kernel = [] if INTERPRETED else on_cuda
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_kernel) for dtype in FLOAT8])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, features", [(16, 16), (272, 80), (128, 64)])
@pytest.mark.parametrize("with_sums", [False, True])
def test_the_kernel_makes_what_pytorchs_operations_make(dtype, source, rows, features, with_sums):
    from ops.float8_triton import quantize

    x = (torch.randn(rows, features) * 10.0 ** torch.randint(-6, 1, (rows, 1))).to(DEVICE, source)
    scale = _scale(x, dtype)
    if INTERPRETED:  # which loses the carry of a value that is rounded up to a power of two
        x = (_cast(x, scale, dtype).float() * scale).to(source)
    x[3, 5], x[7, 2], x[8, 1] = float("nan"), float("inf"), float("-inf")
    x[0, 0], x[5, 1] = 1e6, -1e6
    expected = _cast(x, scale, dtype)
    assert expected[5, 1].float() == -torch.finfo(dtype).max and expected.float().isnan().sum() == 3
    quantized, transposed, sums = quantize(x, scale, dtype, with_sums)
    assert quantized.dtype == transposed.dtype == dtype and transposed.is_contiguous()
    assert torch.equal(transposed.view(torch.uint8), quantized.view(torch.uint8).t())
    # As numbers: there are several NaNs.
    assert torch.allclose(quantized.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    if with_sums:
        good = x.isfinite().all(dim=0)
        assert torch.allclose(sums[good], x.sum(dim=0, dtype=torch.float32)[good], rtol=1e-4, atol=1e-5)
    assert sums.shape == (features if with_sums else 0,)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel is tested in this process")
def test_the_kernel_in_tritons_interpreter():
    run_in_tritons_interpreter("tests/ops/test_float8_triton.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [89, 90])  # older ones multiply no float8
@pytest.mark.parametrize("dtype", ["float8e4nv", "float8e5"])
@pytest.mark.parametrize("with_sums", [False, True])
def test_the_kernel_compiles_and_moves_16_bytes_a_thread(tmp_path, monkeypatch, capability, dtype, with_sums):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.float8_triton import BLOCK_F, BLOCK_T, _quantize_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": "*bf16", "scale": "*fp32", "quantized": "*u8", "transposed": "*u8", "sums": "*fp32"}
    types.update(T="i32", F="i32")
    float8 = getattr(triton.language, dtype)
    values = {"LARGEST": 448.0, "FLOAT8": float8, "SUMS": with_sums, "BLOCK_T": BLOCK_T, "BLOCK_F": BLOCK_F}
    names = _quantize_kernel.arg_names
    source = ASTSource(
        _quantize_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert "ld.global.v4" in code and "st.global.v4" in code
    assert "ld.local" not in code  # no registers spilled


@pytest.mark.skipif(INTERPRETED, reason="traced, not run")
def test_a_compiled_layer_takes_the_kernel_whole_and_for_any_number_of_samples():
    pytest.importorskip("triton", reason="Triton is not installed")
    layer = EncoderLayer(ModelConfig()).to("meta", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False, fullgraph=True)

    def run(samples):
        starts = torch.empty(samples + 1, dtype=torch.int32, device="meta")
        torch._dynamo.mark_dynamic(starts, 0)
        x = torch.empty(1024, 768, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with float8():
            output = compiled(State(Batch(x, x, x, CuSeqlens(starts, 128), {}), CuSeqlens(starts, 128), x)).hidden
        output.backward(torch.empty_like(output))
        assert output.shape == x.grad.shape == x.shape

    run(8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for samples in (9, 1, 100):
            run(samples)
    torch._dynamo.reset()
