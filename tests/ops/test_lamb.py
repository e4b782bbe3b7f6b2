"""LAMB's forms against a float64 transcription of the algorithm, and against each other.

Triton's kernels run here on a GPU where one is there, else in Triton's interpreter, in a process of its own.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert.config import Config, ModelConfig
from bert.tasks import make_model, make_task
from ops.lamb import Lamb, lamb_groups
from ops.native import native
from tests import ROOT
from tests.cuda import on_cuda
from tests.ops.interpreter import run_in_tritons_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED = ["native", pytest.param("triton", marks=[] if INTERPRETED else on_cuda)]
IMPLEMENTATIONS = ["plain", *FUSED]
SHAPES = [(16, 12) if INTERPRETED else (64, 48), (48,), (1,), (3, 5, 7), (0,), (33, 2)]


if INTERPRETED:  # it takes its time: small chunks, so that few values fill several of them
    from ops import lamb_triton

    lamb_triton.CHUNK, lamb_triton.BLOCK, lamb_triton.REDUCED = 64, 32, 4


def device_of(implementation):
    return "cuda" if implementation == "triton" and not INTERPRETED else "cpu"


def paper(w, g, m, v, lr, beta1, beta2, eps, decay, trust_ratio):
    """arXiv 1904.00962, algorithm 2, without bias correction, in float64."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    r = m / (np.sqrt(v) + eps)
    u = r + decay * w
    w_norm, u_norm = np.sqrt((w * w).sum()), np.sqrt((u * u).sum())
    ratio = w_norm / u_norm if trust_ratio and w_norm > 0 and u_norm > 0 else 1.0
    return w - lr * ratio * u, m, v


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("eps", [1e-8, 1e-6][: 1 if INTERPRETED else 2])
@pytest.mark.parametrize("decay, trust_ratio", [(0.01, True), (0.0, False), (0.0, True)])
@pytest.mark.parametrize("zero", ["both", "nothing", "weights", "gradients"][: 1 if INTERPRETED else 4])
def test_ten_steps_equal_the_paper(implementation, eps, decay, trust_ratio, zero):
    rng, device = np.random.default_rng(), device_of(implementation)
    weights = [
        np.zeros(shape) if zero in ("weights", "both") and i % 2 == 0 else rng.normal(size=shape)
        for i, shape in enumerate(SHAPES)
    ]
    parameters = [torch.nn.Parameter(torch.tensor(w, dtype=torch.float32, device=device)) for w in weights]
    weights = [p.detach().cpu().double().numpy().copy() for p in parameters]
    way = [np.linalg.norm(w) for w in weights]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    optimizer = Lamb(
        [{"params": parameters, "weight_decay": decay, "trust_ratio": trust_ratio}],
        lr=0.0,
        eps=eps,
        implementation=implementation,
    )
    for step in range(10):
        optimizer.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        for i, parameter in enumerate(parameters):
            g = rng.normal(size=parameter.shape) * 10.0 ** rng.integers(-3, 2)
            g = np.float32(g * 0 if zero in ("gradients", "both") and i % 3 == 0 else g)
            parameter.grad = torch.from_numpy(g).to(device)
            before = weights[i]
            weights[i], *moments[i] = paper(
                weights[i], g.astype(np.float64), *moments[i], lr, 0.9, 0.999, eps, decay, trust_ratio
            )
            way[i] += np.linalg.norm(weights[i] - before)
        optimizer.step()
    # Relative to the way that a weight went: where it ends near 0, its rounding does not.
    for w, p, length in zip(weights, parameters, way):
        assert np.linalg.norm(p.detach().cpu().double().numpy() - w) <= 1e-6 * length


def trained(implementation, shapes, seed=0, steps=10, dtype=torch.float32, spoil=None):
    """Weights and optimizer after some steps in two groups with learning rates of their own; `spoil(parameters,
    optimizer)` comes before the last step."""
    random, device = torch.Generator().manual_seed(seed), device_of(implementation)

    def draw(shape, scale):
        return (torch.randn(shape, generator=random) * scale).to(device, dtype)

    parameters = [torch.nn.Parameter(draw(shape, 1.0)) for shape in shapes]
    half = len(parameters) // 2
    groups = [{"params": parameters[:half], "lr": 0.01}, {"params": parameters[half:], "lr": 0.03, "weight_decay": 0.0}]
    optimizer = Lamb([group for group in groups if group["params"]], lr=1.0, implementation=implementation)
    optimizer.compute_weights.update((p, p.detach().to(torch.bfloat16)) for p in parameters[::2])
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = draw(parameter.shape, 10.0 ** (step % 4 - 2))
        if spoil and step == steps - 1:
            spoil(parameters, optimizer)
        optimizer.step()
    return parameters, optimizer


def everything(parameters, optimizer):
    """Clones of all that a step may write."""
    return [
        tensor.detach().clone()
        for tensors in (
            parameters,
            (state for p in parameters for state in optimizer.state[p].values()),
            optimizer.compute_weights.values(),
        )
        for tensor in tensors
    ]


def assert_as_plain(parameters, *arguments, **options):
    """The plain form computes in float64 here: in float32 its norms over many values are no better than 1e-6
    themselves."""
    for parameter, expected in zip(parameters, trained("plain", *arguments, dtype=torch.float64, **options)[0]):
        difference = (parameter.detach().cpu().double() - expected.detach()).norm().item()
        assert difference <= 1e-6 * expected.detach().norm().item()


@pytest.mark.parametrize("implementation", FUSED)
def test_fused_forms_equal_the_plain_one_in_any_shapes(implementation):
    @settings(max_examples=3 if INTERPRETED else 40, deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, 8 if INTERPRETED else 40), max_size=3), min_size=1, max_size=6),
        st.integers(0, 2**32 - 1),
    )
    def check(shapes, seed):
        parameters, optimizer = trained(implementation, shapes, seed)
        assert_as_plain(parameters, shapes, seed)
        for parameter, rounded in optimizer.compute_weights.items():
            assert parameter.numel() == 0 or torch.equal(rounded, parameter.to(torch.bfloat16))

    check()


@pytest.mark.parametrize("implementation", FUSED)
def test_sizes_around_the_chunks_and_blocks_of_the_kernels(implementation):
    sizes = (32, 64, 4 * 64) if INTERPRETED else (16, 512, 1024, 4096, 16384, 5 * 16384, 1024 * 4096)
    shapes = [(size + more,) for size in sizes for more in (-1, 0, 1)]
    assert_as_plain(trained(implementation, shapes, steps=2)[0], shapes, steps=2)


@pytest.mark.parametrize("implementation", FUSED)
def test_huge_and_denormal_values_stay_finite(implementation):
    device = device_of(implementation)
    for weight, gradient in ((1e30, 1e30), (1e-42, 1e-42), (1e30, 1e-42), (1e-42, 1e30), (3e38, 1e-45), (1.0, 1e-45)):
        parameter = torch.nn.Parameter(torch.full((20,), weight, device=device))
        optimizer = Lamb([parameter], lr=0.1, weight_decay=0.0, implementation=implementation)
        parameter.grad = torch.full((20,), gradient, device=device)
        optimizer.step()
        assert parameter.isfinite().all() and optimizer.skipped == 0


@pytest.mark.parametrize("implementation", FUSED)
def test_compute_weights_are_rounded_as_pytorch_rounds(implementation):
    # Ties between two bfloat16 neighbours, of an even and an odd one; the largest float32; denormals; zero gradients
    # leave them.
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x00008000, 0x00018000, 0],
        dtype=torch.int32,
    )
    weights = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)]).to(device_of(implementation))
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = torch.zeros_like(parameter)
    optimizer = Lamb([parameter], lr=0.1, weight_decay=0.0, implementation=implementation)
    optimizer.compute_weights[parameter] = torch.empty_like(parameter, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(parameter, weights) and torch.equal(
        optimizer.compute_weights[parameter], weights.to(torch.bfloat16)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_update_and_counts(implementation, value):
    before = []

    def spoil(parameters, optimizer):
        parameters[1].grad[-1] = value
        before.extend(everything(parameters, optimizer))

    parameters, optimizer = trained(
        implementation, [(3, 4), (300,) if INTERPRETED else (20000,), (5,)], steps=3, spoil=spoil
    )
    after = everything(parameters, optimizer)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(after, before))
    assert optimizer.skipped.dtype == torch.int64 and optimizer.skipped.shape == () and optimizer.skipped == 1
    parameters[1].grad[-1] = 0.0
    optimizer.step()
    assert optimizer.skipped == 1 and not torch.equal(parameters[0], before[0])


@pytest.mark.parametrize("implementation", FUSED)
def test_runs_are_equal_bit_for_bit_on_any_number_of_threads(implementation):
    shapes = [(3, 5), (300,), (7,)] if INTERPRETED else [(3, 5), (123, 457), (40000,), (7,), (1300, 1000)]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(everything(*trained(implementation, shapes, steps=2)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_query_key_and_value_have_ratios_of_their_own(implementation):
    query, key, value = (
        torch.nn.Parameter(torch.full((4, 4), scale, device=device_of(implementation))) for scale in (1.0, 2.0, 4.0)
    )
    optimizer = Lamb([query, key, value], lr=0.1, weight_decay=0.0, implementation=implementation)
    for parameter in (query, key, value):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # A step of lr times its own norm, whatever the others' norms are.
    for parameter, scale in ((query, 1.0), (key, 2.0), (value, 4.0)):
        assert torch.allclose(parameter, torch.full_like(parameter, 0.9 * scale))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_slice_of_a_parameter_has_a_ratio_of_its_own_and_the_state_is_whole(implementation):
    rng, device = np.random.default_rng(), device_of(implementation)
    # The last two: slices that are no multiple of what a kernel takes at once, and not aligned to it.
    for slices, shape in ((1, (6, 8)), (2, (6, 8)), (3, (9,)), (6, (6, 4)), (3, (9, 29)), (5, (35, 77))):
        parameters = [torch.nn.Parameter(torch.randn(size, device=device)) for size in (shape, (5, 3))]
        groups = [{"params": parameters[:1], "trust_ratio_slices": slices}, {"params": parameters[1:]}]
        optimizer = Lamb(groups, lr=0.03, weight_decay=0.1, implementation=implementation)
        optimizer.compute_weights[parameters[0]] = torch.empty_like(parameters[0], dtype=torch.bfloat16)
        expected = [p.detach().cpu().double().numpy().copy() for p in parameters]
        moments = [[np.zeros_like(w), np.zeros_like(w)] for w in expected]
        scales = 10.0 ** rng.integers(-2, 3, size=(shape[0],) + (1,) * (len(shape) - 1))
        for _ in range(3):
            gradients = [rng.normal(size=shape) * scales, rng.normal(size=(5, 3))]  # in each slice of another size
            for p, w, m, g, parts in zip(parameters, expected, moments, gradients, (slices, 1)):
                g = np.float32(g)
                p.grad = torch.from_numpy(g).to(device)
                for values in zip(*(np.split(array, parts) for array in (w, g.astype(np.float64), *m))):
                    for part, new in zip(values[::2] + values[3:], paper(*values, 0.03, 0.9, 0.999, 1e-8, 0.1, True)):
                        part[...] = new
            optimizer.step()
        for p, w, m in zip(parameters, expected, moments):
            state = optimizer.state[p]
            assert set(state) == {"exp_avg", "exp_avg_sq"} and state["exp_avg"].shape == p.shape
            for mine, its in ((p, w), (state["exp_avg"], m[0]), (state["exp_avg_sq"], m[1])):
                mine = mine.detach().cpu().double().numpy()
                assert np.linalg.norm(mine - its) <= 1e-5 * np.linalg.norm(its), (slices, shape)
        assert torch.equal(optimizer.compute_weights[parameters[0]], parameters[0].to(torch.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slices_that_do_not_divide_a_parameter_are_an_error_with_its_name(implementation):
    parameter = torch.nn.Parameter(torch.ones(7, 4, device=device_of(implementation)))
    group = {"params": [parameter], "names": ["words"], "trust_ratio_slices": 2}
    optimizer = Lamb([group], lr=0.1, implementation=implementation)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"words: trust_ratio_slices is 2, expected a divisor .* \(7, 4\)"):
        optimizer.step()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_without_gradient_are_left_alone(implementation):
    parameters = [torch.nn.Parameter(torch.ones(3, device=device_of(implementation))) for _ in range(2)]
    optimizer = Lamb(parameters, lr=0.1, implementation=implementation)
    optimizer.step()
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert torch.equal(parameters[0].cpu(), torch.ones(3)) and parameters[0] not in optimizer.state
    assert (parameters[1] < 1).all() and set(optimizer.state[parameters[1]]) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("implementation", FUSED)
def test_state_and_weights_that_were_replaced_are_found(implementation):
    parameters, optimizer = trained(implementation, [(30, 7), (5,)], steps=2)
    others, other = trained(implementation, [(30, 7), (5,)], seed=1, steps=2)
    with torch.no_grad():
        for mine, its in zip(parameters, others):
            optimizer.state[mine] = {key: value.clone() for key, value in other.state[its].items()}
            mine.data, mine.grad = its.detach().clone(), its.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(mine, its) for mine, its in zip(parameters, others))


@pytest.mark.parametrize("implementation", FUSED)
def test_autograd_notices_that_weights_changed(implementation):
    parameter = torch.nn.Parameter(torch.ones(3, device=device_of(implementation)))
    parameter.grad = torch.ones_like(parameter)
    loss = (parameter * parameter).sum()
    Lamb([parameter], lr=0.1, implementation=implementation).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("implementation", FUSED)
def test_tensors_that_the_kernels_cannot_take_are_named(implementation):
    device = device_of(implementation)

    def message(weight, gradient=None, compute_weight=None):
        parameter = torch.nn.Parameter(weight.to(device))
        parameter.grad = torch.ones_like(parameter) if gradient is None else gradient.to(device)
        optimizer = Lamb([{"params": [parameter], "names": ["layer.weight"]}], lr=0.1, implementation=implementation)
        if compute_weight is not None:
            optimizer.compute_weights[parameter] = compute_weight.to(device)
        with pytest.raises(ValueError, match="layer.weight") as raised:
            optimizer.step()
        return str(raised.value)

    assert "torch.float64" in message(torch.ones(2, 3, dtype=torch.float64))
    assert "strides (1, 3)" in message(torch.ones(2, 3).t())
    assert "strides (0, 0)" in message(torch.ones(2, 3), gradient=torch.ones(()).expand(2, 3))
    assert "bfloat16" in message(torch.ones(2, 3), compute_weight=torch.ones(2, 3))


def test_the_form_is_chosen_by_the_device_and_wrong_ones_are_refused():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert Lamb([parameter], lr=0.1).implementation == "native" and native() is not None
    with pytest.raises(ValueError, match="'fused'; expected one of auto, native"):
        Lamb([parameter], lr=0.1, implementation="fused")
    with pytest.raises(ValueError, match="meta"):
        Lamb([torch.nn.Parameter(torch.ones(2, device="meta"))], lr=0.1, implementation="native")


@pytest.mark.parametrize("compiler, reason", [("/nonexistent/g++", "No such file"), ("false", "non-zero exit status")])
def test_without_a_compiler_it_warns_once_and_works(tmp_path, compiler, reason):
    code = (
        "import torch, warnings\nfrom ops.lamb import Lamb\nwarnings.simplefilter('always')\n"
        "for _ in range(2):\n    p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "    optimizer = Lamb([p], lr=0.1)\n"
        "    optimizer.step(); print(optimizer.implementation, bool((p < 1).all()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": compiler, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.stdout.split() == ["plain", "True"] * 2, done.stderr
    assert done.stderr.count("UserWarning") == 1 and reason in done.stderr and not os.listdir(tmp_path)


def test_kernels_are_built_once_for_processes_that_start_together(tmp_path):
    code = "from ops.native import native; print(native()._name)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    names = {process.communicate()[0].strip() for process in started}
    assert names == {str(tmp_path / os.listdir(tmp_path)[0])} and len(os.listdir(tmp_path)) == 1


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton's form is tested in this process")
@pytest.mark.slow
def test_triton_form_in_its_interpreter():
    run_in_tritons_interpreter("tests/ops/test_lamb.py", "-k", "triton", "tests/ops/test_lamb_shards.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("aligned", [True, False])
def test_triton_kernels_compile_for_hopper_and_load_16_bytes_a_thread(aligned, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops import lamb_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        "parameters": "*i64",
        "groups": "*fp32",
        "numbers": "*i32",
        "w_squares": "*fp64",
        "u_squares": "*fp64",
        "sums": "*fp64",
        "infinite": "*i32",
        "steps": "*fp32",
        "skip": "*i32",
        "skipped": "*i64",
        "count": "i32",
        "chunks": "i32",
    }
    constants = {
        "ALIGNED": aligned,
        "CHUNK": lamb_triton.CHUNK,
        "BLOCK": lamb_triton.BLOCK,
        "REDUCED": lamb_triton.REDUCED,
    }
    on_chunks = lamb_triton._norms_kernel, lamb_triton._write_kernel
    for kernel in (*on_chunks, lamb_triton._ratios_kernel, lamb_triton._sums_kernel, lamb_triton._steps_kernel):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        )
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
        assert kernel not in on_chunks or ("ld.global.v4" in code) == aligned
        assert "atom" not in code  # sums in a fixed order


def test_groups_are_the_recipes():
    sizes = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = Config(model=ModelConfig(**sizes))
    graph = make_model(config, make_task(config))
    options = {
        name: (group["weight_decay"], group["trust_ratio"])
        for group in lamb_groups(graph.named_parameters(), 0.01)
        for name in group["names"]
    }
    assert set(options) == set(dict(graph.named_parameters()))
    layer = "bert.encoder.layer.0."
    for part in ("query", "key", "value"):  # three parameters, each with a trust ratio of its own
        assert options[layer + f"attention.self.{part}.weight"] == (0.01, True)
        assert options[layer + f"attention.self.{part}.bias"] == (0.0, False)
    assert options["bert.embeddings.word_embeddings.weight"] == options["cls.seq_relationship.weight"] == (0.01, True)
    assert options["bert.embeddings.LayerNorm.weight"] == options[layer + "output.LayerNorm.weight"] == (0.0, True)
    assert options["bert.embeddings.LayerNorm.bias"] == options["cls.predictions.bias"] == (0.0, False)
    *others, words = lamb_groups(graph.named_parameters(), 0.01, slices=5)
    assert words["names"] == ["bert.embeddings.word_embeddings.weight"] and words["trust_ratio_slices"] == 5
    assert words["trust_ratio"] and words["weight_decay"] == 0.01
    assert sum(len(group["names"]) for group in others) == len(options) - 1
