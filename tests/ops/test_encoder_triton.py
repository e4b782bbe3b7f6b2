"""The encoder's Triton kernels against float64: on a GPU where one is there, else in Triton's interpreter, in a process
of its own.

Shape letters: T tokens, A heads, D head size, H = A * D.
"""

import os
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F

from bert.config import ModelConfig
from bert.model.batch import State
from bert.model.blocks import EncoderLayer
from ops.attention import CuSeqlens
from tests.cuda import on_cuda
from tests.ops.interpreter import run_in_tritons_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_kernel = [] if INTERPRETED else on_cuda
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = [pytest.param(dtype, marks=on_kernel) for dtype in TOLERANCES]
on_kernel_alone = pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=on_kernel)])
LENGTHS = [100, 0, 28, 128, 1, 33, 0]


@pytest.fixture
def on_triton(monkeypatch):
    """The operations take the kernels, on the CPU too."""
    for file in ("ops.linear", "ops.attention"):
        monkeypatch.setattr(f"{file}.takes_triton", lambda tensor: True)
    monkeypatch.setattr("ops.native.is_native", lambda *tensors, **options: False)


@pytest.fixture(autouse=True)
def interpret_products_of_bfloat16(monkeypatch):
    """Triton's interpreter, which has bfloat16 as 16-bit integers, multiplies those."""
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(builder, a, b, *options):
        return multiply(builder, widen(a), widen(b), *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def random(*shape, dtype):
    """A leaf, and the same in float64."""
    tensor = torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()
    return tensor, tensor.detach().double().requires_grad_()


def assert_agree(output, expected, inputs, exact_inputs, tolerance):
    """Outputs, and the gradients of the inputs, whose type they have."""
    direction = torch.randn_like(output)
    assert_near(output, expected, tolerance)
    found = torch.autograd.grad(output, inputs, direction)
    for fast, slow in zip(found, torch.autograd.grad(expected, exact_inputs, direction.double())):
        assert fast.dtype == output.dtype
        assert_near(fast, slow, tolerance)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("tokens, features", [(1, 16), (130, 272), (300, 40)])
def test_gelu_and_its_gradients_are_those_of_float64(dtype, tokens, features):
    from ops.gelu_triton import gelu

    x, exact = random(tokens, features, dtype=dtype)
    bias, exact_bias = torch.zeros(2, features, device=DEVICE).unbind()
    bias, exact_bias = bias.to(dtype).requires_grad_(), exact_bias.double().requires_grad_()
    expected = F.gelu(exact + exact_bias)
    assert_agree(gelu(x, bias), expected, [x, bias], [exact, exact_bias], TOLERANCES[dtype])


@on_kernel_alone
def test_gelu_is_exact_everywhere(device):
    from ops.gelu_triton import gelu

    x = torch.linspace(-12, 12, 4096, device=device)[None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = gelu(x, torch.zeros(4096, device=device)), F.gelu(exact)
    assert (y - expected).abs().max() < 2e-6
    (found,), (slope,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), exact)
    assert (found - slope).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("tokens, hidden, p", [(70, 96, 0.3), (5, 768, 0.1), (1, 1024, 0.0), (600, 64, 0.1)])
def test_dropout_add_norm_and_its_gradients_are_those_of_float64(dtype, tokens, hidden, p):
    from ops.dropout_triton import draw_seed
    from ops.norm_triton import _norm, dropout_add_norm

    (x, exact_x), (residual, exact_residual) = (random(tokens, hidden, dtype=dtype) for _ in range(2))
    parameters, exact_parameters = zip(*(random(hidden, dtype=dtype) for _ in range(3)))
    bias, weight, norm_bias = parameters
    torch.manual_seed(3)
    seed = draw_seed(x.device)
    ones = torch.ones_like(x), bias, torch.zeros_like(x), weight, norm_bias, seed, 1e-5, p
    scale = _norm(*ones)[1].double().clone()  # what dropout multiplies each element by
    assert set((scale > 0).unique().tolist()) == ({True} if not p else {True, False})
    scale = (scale > 0) / (1 - round(p * 65536) / 65536)
    exact_bias, exact_weight, exact_norm_bias = exact_parameters
    total = (exact_x + exact_bias - exact_bias.detach()) * scale + exact_residual  # x has the bias in it already
    expected = F.layer_norm(total, (hidden,), exact_weight, exact_norm_bias, 1e-5)
    torch.manual_seed(3)
    found = dropout_add_norm(x, bias, residual, weight, norm_bias, 1e-5, p)
    inputs = [x, residual, *parameters]
    assert_agree(found, expected, inputs, [exact_x, exact_residual, *exact_parameters], TOLERANCES[dtype])


def spans(lengths=LENGTHS):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def attention_in_float64(query, key, value, lengths, heads, scales):
    """Sample by sample; scales: of the weights, [A, n, n] for each sample."""
    contexts, parts = [], [tensor.unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (query, key, value)]
    for samples, scale in zip(zip(*[part.split(lengths, dim=1) for part in parts]), scales):
        q, k, v = samples
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        contexts.append(((weights * scale) @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


def drawn_scales(lengths, heads, longest, p):
    """What dropout multiplies each weight by: equal scores, and values that are unit vectors, show it."""
    from ops.attention_triton import varlen_attention

    units = torch.cat([torch.eye(n, 128, device=DEVICE) for n in lengths]).repeat(1, heads).half()
    zeros = torch.zeros_like(units)
    context = varlen_attention(zeros, zeros, units, spans(lengths), longest, heads, p)
    kept = context.unflatten(-1, (heads, 128)).transpose(0, 1).split(lengths, dim=1)
    return [(sample[:, :, :n] > 0) / (1 - round(p * 65536) / 65536) for n, sample in zip(lengths, kept)]


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize(
    "lengths, longest, heads, size, p",
    [
        (LENGTHS, 128, 2, 64, 0.1),
        ([3, 0, 17], 17, 2, 64, 0.0),
        ([3, 0, 17], 17, 1, 16, 0.3),
        (LENGTHS[2:], 128, 3, 48, 0.1),
        ([64, 7], 64, 1, 128, 0.1),
    ],
)
def test_attention_and_its_gradients_are_those_of_float64(dtype, lengths, longest, heads, size, p):
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("the engine takes rows and their mask in float32")
    from ops.attention_triton import varlen_attention

    width = heads * size
    product, exact = random(sum(lengths), 3 * width, dtype=dtype)
    torch.manual_seed(5)
    scales = drawn_scales(lengths, heads, longest, p)
    expected = attention_in_float64(*exact.split(width, dim=1), lengths, heads, scales)
    torch.manual_seed(5)
    found = varlen_attention(*product.split(width, dim=1), spans(lengths), longest, heads, p)
    assert_agree(found, expected, [product], [exact], TOLERANCES[dtype])


@on_kernel_alone
def test_dropout_drops_its_share_anew_for_each_seed_sample_and_head(device):
    torch.manual_seed(1)
    first = torch.stack(drawn_scales([128] * 4, 2, 128, 0.25)).flatten(0, 1) > 0
    torch.manual_seed(1)
    assert torch.equal(first, torch.stack(drawn_scales([128] * 4, 2, 128, 0.25)).flatten(0, 1) > 0)
    second = torch.stack(drawn_scales([128] * 4, 2, 128, 0.25)).flatten(0, 1) > 0
    masks = torch.cat([first, second]).float()
    assert abs(masks.mean() - 0.75) < 0.005
    for mask in (masks.mean(dim=(0, 1)), masks.mean(dim=(0, 2))):  # no row or column is dropped more often
        assert (mask - 0.75).abs().max() < 0.06
    flat = (masks - 0.75).flatten(1)
    similar = (flat @ flat.t()) / (0.1875 * flat.shape[1]) - torch.eye(len(flat), device=device)
    assert similar.abs().max() < 0.05


def layer(dtype=torch.float32, dropout=0.0):
    config = ModelConfig(
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=192,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    made = EncoderLayer(config).to(DEVICE)
    for parameter in made.parameters():
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).detach()
    return made.to(dtype).train()


def run(module, hidden, cu_seqlens, longest=128):
    """The output of a layer, and the gradients of its input and parameters."""
    hidden = hidden.detach().requires_grad_()
    output = module(State(None, CuSeqlens(cu_seqlens, longest), hidden)).hidden
    inputs = [hidden, *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * torch.cos(output.detach())).sum(), inputs)]


@pytest.mark.parametrize("compiled", [False, True])
@on_kernel_alone
def test_a_layer_on_the_kernels_is_the_plain_one(request, device, compiled):
    def plain_attention(query, key, value, *_):
        return attention_in_float64(query, key, value, LENGTHS, 2, [1.0] * len(LENGTHS))

    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 3e-2)
    module, hidden = layer(torch.bfloat16).double(), torch.randn(sum(LENGTHS), 128, device=device).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert.model.blocks.attention", plain_attention)
        expected = run(module, hidden.double(), spans())
    request.getfixturevalue("on_triton")
    module.to(dtype)
    if compiled:
        module.compile(dynamic=False, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for fast, slow in zip(run(module, hidden.to(dtype), spans()), expected):
        if slow.norm() > 1e-9:  # the gradient of the keys' bias is 0
            assert_near(fast, slow, tolerance)


@pytest.mark.parametrize("dtype", dtypes[:1])
def test_a_compiled_layer_takes_another_number_of_samples_as_it_is_and_draws_anew(on_triton, dtype):
    graphs = []

    def backend(traced, inputs):
        graphs.append(traced)
        return traced

    module = layer(dtype, dropout=0.1)
    module.compile(dynamic=False, fullgraph=True, backend=backend)
    hidden, outputs = torch.randn(128, 128, device=DEVICE), []
    for lengths in ([128], [100, 28], [100, 28], [1, 2, 3, 122]):
        cu_seqlens = spans(lengths)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        outputs.append(run(module, hidden, cu_seqlens)[0])
    assert len(graphs) == 1
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", dtypes[:1])
def test_the_operations_are_registered_as_compilers_need_them(dtype):
    from ops.attention_triton import _attention
    from ops.gelu_triton import _gelu
    from ops.norm_triton import _norm

    x, residual, product = (torch.randn(40, n, device=DEVICE, requires_grad=True) for n in (32, 32, 96))
    bias, weight = (torch.randn(32, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.tensor([7], device=DEVICE)
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    query, key, value = (part.detach().requires_grad_() for part in product.split(32, dim=1))
    for operation, arguments in (
        (_gelu, (x, bias)),
        (_norm, (x, bias, residual, weight, bias.detach(), seed, 1e-5, 0.1)),
        (_attention, (query, key, value, spans([30, 10]), seed, 30, 2, 0.1)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=checks)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels are tested in this process")
def test_the_kernels_in_tritons_interpreter():
    run_in_tritons_interpreter("tests/ops/test_encoder_triton.py")


TYPES = {  # what is no tensor in bfloat16
    **dict.fromkeys(["normalizers", "statistics", "sums"], "*fp32"),
    **dict.fromkeys(["T", "size", "query_stride", "key_stride", "value_stride"], "i32"),
    **{"cu_seqlens": "*i32", "seed": "*i64", "eps": "fp32"},
}


def compiled_for(kernel, capability, constants, tmp_path, **options):
    """The kernel's PTX, its bytes of shared memory, and of a thread's registers that are spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in names}
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] not in ("constexpr", "fp32")},
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(done.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], text=True, capture_output=True, check=True)
    stack, local = (int(re.search(f"{word}:(\\d+)", usage.stdout)[1]) for word in ("STACK", "LOCAL"))
    return done.asm["ptx"], done.metadata.shared, stack + local


def kernels(capability):
    """Each kernel with the constants of BERT-base, and its options."""
    from ops import attention_triton, gelu_triton, norm_triton

    hidden, drops = {"H": 768, "TOKENS": 4, "BLOCK": 1024}, {"THRESHOLD": 6554}
    assert norm_triton._tiling(768) == (4, 1024)
    spans = {"SCALE": 0.18, "A": 12, "D": 64, "BLOCK_D": 64, "BLOCK": 128, **drops}
    queries = 128 if capability == 90 else attention_triton.QUERIES
    tile = {"F": 3072, **{name: getattr(gelu_triton, name) for name in ("TOKENS", "FEATURES", "TILES")}}
    yield attention_triton._attention_forward_kernel, spans, {"num_warps": 8}
    yield attention_triton._attention_backward_kernel, {**spans, "QUERIES": queries}, {"num_warps": 8, "num_stages": 1}
    yield norm_triton._norm_forward_kernel, {**hidden, **drops}, {"num_warps": 4}
    yield norm_triton._norm_backward_kernel, {**hidden, **drops, "TILES": norm_triton.TILES}, {"num_warps": 4}
    yield gelu_triton._gelu_forward_kernel, {"BLOCK": gelu_triton.BLOCK}, {"num_warps": 4}
    yield gelu_triton._gelu_backward_kernel, tile, {"num_warps": 4}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_kernels_compile_load_16_bytes_a_thread_and_spill_no_registers(tmp_path, monkeypatch, capability):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, constants, options in kernels(capability):
        code, shared, spilled = compiled_for(kernel, capability, constants, tmp_path, **options)
        assert spilled == 0 and shared <= 99 * 1024, kernel.fn
        assert "st.global.v4" in code and ("ld.global.v4" in code or "cp.async.cg.shared.global" in code), kernel.fn


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_attention_compiles_for_heads_smaller_than_a_matrix_unit_takes(tmp_path, monkeypatch):
    attention_triton = pytest.importorskip("ops.attention_triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    query = torch.empty(9, 16)
    *_, size, block_size, block = attention_triton._sizes(query, query, query, 128, 2, 0.1)
    assert size == 8
    for kernel, constants, options in list(kernels(90))[:2]:
        small = {**constants, "A": 2, "D": size, "BLOCK_D": block_size, "BLOCK": block}
        compiled_for(kernel, 90, small, tmp_path, **options)
