"""Which device a run gets, with small packages in place of Graphcore's: what they lack, what they find, and every
error's words."""

import sys
import types

import pytest
import torch

from bert.config import Config, ModelConfig
from bert.engines import make_engine, mps
from bert.engines.choosing import choose_device, local_parts, part_of
from bert.engines.mps import tiny_batch, train_tiny
from bert.engines.torch_devices import Cpu, Cuda, Mps, choose_precision
from data.errors import InputError
from data.rows import WHOLE, Part

POPTORCH = """
Options = PipelinedExecution = optim = trainingModel = None
def ipuHardwareIsAvailable(num_ipus=1):
    return num_ipus <= %d and num_ipus in (1, 2, 4, 8, 16, 32, 64)
def ipuHardwareVersion():
    return %d
"""
POPART = "AccumulateOuterFragmentSchedule = SubgraphCopyingStrategy = None"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name=source, ...) puts packages on the path; there are no others of these names."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name) for name in ("poptorch", "popart") if name in sys.modules}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(source)

    yield write
    for name in ("poptorch", "popart"):
        sys.modules.pop(name, None)
    sys.modules.update(before)


def refusal(*arguments, **options):
    with pytest.raises(InputError) as error:
        choose_device("ipu", *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_has(text, *words):
    for word in words:
        assert word in text


def pretend_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch, "compiler", None, raising=False)  # torch 2.0 has none


@pytest.mark.parametrize(
    "ipus, version, line",
    [
        (16, 2, "ipu (16 Mk2 IPUs)"),
        (4, 21, "ipu (4 float8 Mk2 IPUs)"),
        (1, -1, "ipu (1 IPU)"),
        (12, 2, "ipu (12 Mk2 IPUs)"),
    ],
)
@pytest.mark.parametrize("wanted", ["ipu", "auto"])
def test_ipus_are_taken_where_poptorch_finds_them(install, wanted, ipus, version, line):
    install(poptorch=POPTORCH % (16, version), popart=POPART)
    assert choose_device(wanted, ipus) == ("ipu", line)


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_another_device_that_is_asked_for_does_not_even_import_poptorch(install, wanted, monkeypatch):
    install(poptorch="raise SystemExit", popart="raise SystemExit")
    pretend_cuda(monkeypatch)
    device, line = choose_device(wanted)
    assert device == wanted and line.startswith({"cpu": "cpu (", "cuda": "cuda (H200)"}[wanted]) and "IPU" not in line


@pytest.mark.parametrize(
    "there, ipus, found",
    [(4, 16, "finds 4 IPUs, expected 16"), (0, 4, "finds 0 IPUs, expected 4"), (8, 12, "finds 8 IPUs, expected 16")],
)
def test_too_few_ipus_are_named_with_the_ways_out(install, there, ipus, found):
    install(poptorch=POPTORCH % (there, 2), popart=POPART)
    assert_has(
        refusal(ipus),
        found,
        "smaller POD",
        "--ipu.replication_factor",
        "--ipu-model",
        "--compile-only",
        "--device auto",
    )
    device, line = choose_device("auto", ipus)
    assert device == "cpu" and line.endswith(f"PopTorch finds {f'{there} IPUs, not 16' if there else 'no IPU'})")


def test_without_need_of_hardware_none_is_looked_for(install):
    install(poptorch=POPTORCH % (0, 2), popart=POPART)
    for wanted in ("ipu", "auto"):
        device, line = choose_device(wanted, 16, needs_hardware=False)
        assert device == "ipu" and "without hardware" in line


def test_without_poptorch_the_error_says_where_it_comes_from(install):
    install()
    assert_has(refusal(16), "PopTorch is not installed", "Poplar SDK", "Python 3.8", "torch 2.0.1", "--device auto")
    assert choose_device("auto", 16) == (
        "cpu",
        f"cpu ({torch.get_num_threads()} threads: no CUDA device, no PopTorch)",
    )


@pytest.mark.parametrize(
    "packages, name, lacks",
    [
        ({"popart": "version = 1"}, "popart", "AccumulateOuterFragmentSchedule"),
        ({"popart": "version = 1", "poptorch": POPTORCH % (16, 2)}, "popart", "AccumulateOuterFragmentSchedule"),
        ({"poptorch": "Options = None", "popart": POPART}, "poptorch", "PipelinedExecution"),
    ],
)
def test_another_package_of_the_name_is_refused_with_its_file(install, tmp_path, packages, name, lacks):
    install(**packages)
    assert_has(
        refusal(16),
        f"the {name} in {tmp_path / name / '__init__.py'} is not Graphcore's",
        lacks,
        "pip uninstall " + name,
        "enable.sh",
        "poptorch-*.whl",
        "Python 3.8",
        "torch 2.0.1",
        "docs/ipu.md",
    )
    device, line = choose_device("auto", 16)
    assert device == "cpu" and line.endswith(
        ": no CUDA device, no PopTorch)" if "poptorch" not in packages else "not Graphcore's)"
    )


def test_auto_leaves_a_popart_alone_where_there_is_no_poptorch(install):
    install(popart="raise SystemExit")
    assert choose_device("auto")[0] == "cpu"


def test_a_folder_of_the_name_is_no_package_of_graphcores(install, tmp_path):
    (tmp_path / "poptorch").mkdir()
    assert_has(refusal(), str(tmp_path / "poptorch"), "is not Graphcore's")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("raise ImportError('libpoplar.so: cannot open:\\n no such file')", "libpoplar.so: cannot open: no such file"),
        ("import no_such_part", "no_such_part"),
        ("raise RuntimeError('torch 2.0.1 expected')", "torch 2.0.1 expected"),
    ],
)
def test_a_poptorch_that_cannot_be_imported_is_named_with_the_reason(install, tmp_path, source, reason):
    install(poptorch=source, popart=POPART)
    assert_has(
        refusal(16),
        str(tmp_path / "poptorch"),
        "cannot be imported",
        reason,
        "enable.sh",
        torch.__version__,
        "--device auto",
    )
    device, line = choose_device("auto", 16)
    assert device == "cpu" and line.endswith("PopTorch cannot be imported)")


def test_poptorch_without_popart_is_an_sdk_that_is_not_enabled(install):
    install(poptorch=POPTORCH % (16, 2))
    assert_has(refusal(16), "without popart", "enable.sh", "--device auto")


def test_auto_takes_cuda_where_there_is_no_ipu_and_says_why(install, monkeypatch):
    install(poptorch=POPTORCH % (0, 2), popart=POPART)
    pretend_cuda(monkeypatch)
    assert choose_device("auto", 16) == ("cuda", "cuda (H200: PopTorch finds no IPU)")


def test_the_device_of_a_fork_is_taken_at_its_word():
    assert choose_device("xpu") == ("xpu", "xpu")


def pretend_mps(monkeypatch, patch=lambda monkeypatch: None):
    """An Apple GPU that computes as the CPU does after `patch`."""

    def train(device):
        with monkeypatch.context() as other:
            if device == "mps":
                patch(other)
            return train_tiny("cpu")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(mps, "train_tiny", train)


def test_auto_takes_an_apple_gpu_after_cuda(install, monkeypatch):
    install()
    pretend_mps(monkeypatch)
    assert choose_device("auto") == ("mps", "mps (Apple GPU: no CUDA device, no PopTorch)")
    assert choose_device("mps") == ("mps", "mps (Apple GPU)")
    assert choose_device("cpu")[0] == "cpu"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto")[0] == "cpu"
    pretend_cuda(monkeypatch)
    monkeypatch.setattr("bert.engines.choosing.take_card", lambda: None)
    assert choose_device("auto")[0] == "cuda"


def forget_the_mask(monkeypatch):
    monkeypatch.setattr("ops.attention.same_sample_mask", lambda ids: torch.ones(len(ids), 1, 1, 1, dtype=torch.bool))


def lack_an_operation(monkeypatch):
    def gelu(*arguments):
        raise NotImplementedError("aten::gelu is not implemented for mps\nfile a bug")

    monkeypatch.setattr("ops.linear.linear_gelu_plain", gelu)
    monkeypatch.setattr("ops.linear._is_native", lambda *tensors, parameters: False)


def update_too_far(monkeypatch):
    monkeypatch.setattr("ops.lamb._choose", lambda *_: "plain")
    monkeypatch.setattr("ops.lamb._updated", lambda w, *_: torch.ones_like(w))


@pytest.mark.parametrize(
    "patch, why",
    [
        (forget_the_mask, "mps computes wrongly: the "),
        (update_too_far, "mps computes wrongly: the updated bert"),
        (lack_an_operation, "mps fails: aten::gelu is not implemented for mps"),
    ],
)
def test_an_apple_gpu_that_computes_wrongly_is_left_alone_and_the_line_says_why(install, monkeypatch, patch, why):
    install()
    pretend_mps(monkeypatch, patch)
    device, line = choose_device("auto")
    assert device == "cpu" and why in line
    with pytest.raises(InputError, match=f'device is "mps", but {why}.*--device auto'):
        choose_device("mps")


def test_without_an_apple_gpu_asking_for_one_is_an_error():
    with pytest.raises(InputError, match='device is "mps", but PyTorch finds no Apple GPU. Use --device auto'):
        choose_device("mps")


def test_steps_on_an_apple_gpu_are_those_on_the_cpu(monkeypatch):
    """With the CPU in its place."""
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(Mps, "name", "cpu")
    monkeypatch.setattr(Mps, "fork_random", Cpu.fork_random)
    monkeypatch.setattr("ops.native.native", lambda dtype: None)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = Config(model=ModelConfig(max_position_embeddings=16, **sizes))
    config.training.micro_batch_size, config.training.precision = 3, "float32"
    found = []
    for device in ("cpu", "mps"):
        engine = make_engine(config, device)
        metrics = engine.step(tiny_batch(), 0.01, 1)
        engine.wait_for(1)
        found.append({**engine.weights(), **metrics, **engine.evaluate(tiny_batch())})
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())


def test_cuda_without_a_device_or_with_the_torch_of_ipus_is_a_clear_error(install, monkeypatch):
    install()
    with pytest.raises(InputError, match="finds no CUDA device.*--device auto"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch, "compiler", raising=False)
    with pytest.raises(InputError, match="older than requirements.txt"):
        choose_device("cuda")
    assert choose_device("auto")[0] == "cpu"


def test_a_device_without_an_engine_is_an_error_that_names_those_there_are():
    with pytest.raises(InputError, match='device is "tpu", expected one of cpu, cuda, mps, ipu'):
        make_engine(Config(), "tpu")


@pytest.mark.parametrize(
    "capability, precision", [((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_auto_takes_bfloat16_where_the_card_multiplies_it_and_not_where_it_is_emulated(
    monkeypatch, capability, precision
):
    card = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert choose_precision(Cuda(), "auto") == precision


@pytest.mark.parametrize("variable", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_environment_configures_the_allocator(monkeypatch, variable):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    matmul, settings = torch.backends.cuda.matmul, []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        Cuda().start(keeps_memory=True)
        assert settings == ([] if variable else ["expandable_segments:True"])
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_each_process_knows_the_parts_of_all_on_its_machine(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = Config()
    assert local_parts(config, "cpu") == ([WHOLE], 0)
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert local_parts(config, "cpu") == ([Part(4, 6)], 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert local_parts(config, "cpu") == ([Part(3, 6), Part(4, 6), Part(5, 6)], 1)
    config.parallel.pipeline = 3  # in two copies of the model
    assert local_parts(config, "cuda") == ([Part(1, 2), Part(0, 2), Part(1, 2)], 1)
    assert part_of(config, "cuda") == Part(0, 2) and part_of(config, "ipu") == WHOLE
