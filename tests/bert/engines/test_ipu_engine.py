"""The IPU engine on the stand-in for PopTorch: whole runs beside the CPU engine's, options, moments, processes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from bert.command_line import parse_command_line
from bert.config import Config, IpuConfig, OptimizerConfig
from bert.engines import make_engine
from bert.engines.ipu import IpuEngine, make_options
from bert.engines.ipu_optimizer import read_state, write_state
from bert.model.stages import make_stages
from bert.run.checkpoint import list_checkpoints, read_safetensors
from data.errors import InputError
from data.rows import unpacked_batch
from run_pretraining import main
from tests import ROOT
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, checkpoints, make_shards, read_lines, without_times
from tests.make_samples import random_samples
from tests.poptorch_contract import python_path, sdk

pytestmark = pytest.mark.ipu

EXACT = {
    "training__precision": "float32",
    "model__hidden_dropout_prob": 0,
    "model__attention_probs_dropout_prob": 0,
    "optimizer__warmup_ratio": 0,
    "optimizer__eps": 1e-6,
    "training__max_steps": 3,
}
GEOMETRY = {
    "device": "ipu",
    "ipu__layers_per_ipu": "[0, 2]",
    "ipu__micro_batch_size": 2,
    "ipu__gradient_accumulation_steps": 6,
    "ipu__replication_factor": 2,
}


@pytest.fixture
def poptorch(monkeypatch):
    return sdk(monkeypatch)


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


@pytest.fixture
def engines(monkeypatch):
    """The engines of the runs, in order."""
    made = []
    monkeypatch.setattr(
        "bert.run.loop.make_engine", lambda *arguments: made.append(make_engine(*arguments)) or made[-1]
    )
    return made


def newest(tmp_path, run, file="model.safetensors"):
    return read_safetensors(os.path.join(list_checkpoints(str(tmp_path / run / "checkpoints"))[-1], file))


def assert_same_run(tmp_path, one, other, tolerance=1e-5):
    """Weights, moments and metrics. The gradient of key biases is rounding, which LAMB makes as large as any."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = newest(tmp_path, one, file), newest(tmp_path, other, file)
        assert a.keys() == b.keys()
        for name in a:
            if "attention.self.key.bias" not in name:
                assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), (file, name)
    for mine, theirs in zip(read_lines(tmp_path, one), read_lines(tmp_path, other)):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"sequences_per_second", "data_wait_fraction"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data__packing": "rows"},
        {"ipu__embedding_serialization_factor": 2},
        {"ipu__layers_per_ipu": "[1,1]"},
        {"ipu__layers_per_ipu": "[2]"},
        {"ipu__recompute_checkpoint_every_layer": "false", "ipu__optimizer_state_offchip": "true"},
        {"ipu__operation_proportions.mlm_decoder": 0.1},
        {"ipu__embedding_serialization_factor": 3, "optimizer__trust_ratio_slices": 3},
        {"task__nsp": "false"},
    ],
    ids=lambda options: " ".join(options) or "as it is",
)
@pytest.mark.slow
def test_a_run_on_ipus_has_the_weights_of_one_on_the_cpu(tmp_path, shards, poptorch, options):
    assert main(arguments(tmp_path, shards, **EXACT, **options, training__output=tmp_path / "cpu")) == 0
    assert (
        main(
            arguments(
                tmp_path,
                shards,
                **{**EXACT, **options, **GEOMETRY},
                training__output=tmp_path / "ipu",
                ipu__executable_cache_dir=tmp_path / "exe",
            )
        )
        == 0
    )
    assert len(read_lines(tmp_path, "ipu")) == 3
    assert_same_run(tmp_path, "ipu", "cpu")


@pytest.mark.slow
def test_phase_2_on_ipus_starts_from_phase_1s_weights(tmp_path, shards, poptorch):
    longer = make_shards(tmp_path / "longer", seed=1, length=2 * LENGTH, masks=2 * MASKS)
    both = {**EXACT, "model__max_position_embeddings": 2 * LENGTH, "ipu__executable_cache_dir": tmp_path / "exe"}
    assert main(arguments(tmp_path, shards, **{**both, **GEOMETRY}, training__output=tmp_path / "one")) == 0
    start = list_checkpoints(str(tmp_path / "one" / "checkpoints"))[-1]
    for device in ({}, GEOMETRY):
        assert (
            main(
                arguments(
                    tmp_path,
                    longer,
                    **{**both, **device},
                    data__sequence_length=2 * LENGTH,
                    data__mask_tokens=2 * MASKS,
                    training__start_from=start,
                    optimizer__name="lamb",
                    optimizer__learning_rate=0.003,
                    ipu__embedding_serialization_factor=2,
                    training__output=tmp_path / device.get("device", "cpu"),
                )
            )
            == 0
        )
    assert_same_run(tmp_path, "ipu", "cpu")


@pytest.mark.parametrize("first, second", [("cpu", "ipu"), ("ipu", "cpu"), ("ipu", "ipu")])
@pytest.mark.slow
def test_a_run_goes_on_on_another_device(tmp_path, shards, poptorch, first, second):
    exact = {
        **EXACT,
        "training__max_steps": 4,
        "ipu__executable_cache_dir": tmp_path / "exe",
        "ipu__embedding_serialization_factor": 3,
    }
    assert main(arguments(tmp_path, shards, **exact, training__output=tmp_path / "whole")) == 0
    for device, stop in ((first, 2), (second, 4)):
        changes = GEOMETRY if device == "ipu" else {}
        assert (
            main(
                arguments(
                    tmp_path,
                    shards,
                    **{**exact, **changes},
                    training__output=tmp_path / "parts",
                    training__stop_at_step=stop,
                    resume="auto",
                )
            )
            == 0
        )
    assert_same_run(tmp_path, "parts", "whole")


@pytest.mark.slow
def test_in_float16_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path, shards, poptorch):
    half = {
        **EXACT,
        **GEOMETRY,
        "training__precision": "auto",
        "training__max_steps": 6,
        "ipu__executable_cache_dir": tmp_path / "exe",
    }
    assert main(arguments(tmp_path, shards, **half, training__output=tmp_path / "whole")) == 0
    for stop in (4, 6):
        changes = {**half, "training__output": tmp_path / "parts", "training__stop_at_step": stop, "resume": "auto"}
        assert main(arguments(tmp_path, shards, **changes)) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = newest(tmp_path, "whole", file), newest(tmp_path, "parts", file)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in newest(tmp_path, "whole").values())
    assert main(arguments(tmp_path, shards, **{**half, "device": "cpu"}, training__output=tmp_path / "cpu")) == 0
    losses, expected = [[line["mlm_loss"] for line in read_lines(tmp_path, run)] for run in ("whole", "cpu")]
    assert losses == pytest.approx(expected, rel=2e-2) and losses[-1] < losses[0]


@pytest.mark.slow
def test_held_out_samples_are_evaluated_on_the_ipus_as_on_the_cpu(tmp_path, shards, poptorch, engines):
    for device in ({}, GEOMETRY):
        name = device.get("device", "cpu")
        assert (
            main(
                arguments(
                    tmp_path,
                    shards,
                    **{**EXACT, **device},
                    data__files=shards / "train-00000.h5",
                    data__held_out_files=shards / "train-00001.h5",
                    training__output=tmp_path / name,
                    ipu__executable_cache_dir=tmp_path / "exe",
                )
            )
            == 0
        )
    found, expected = [json.loads((tmp_path / name / "held_out.json").read_text()) for name in ("ipu", "cpu")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert (
        engines[-1].inference.options.called["deviceIterations"] == 3 and not engines[-1].training.isAttachedToDevice()
    )


def test_auto_takes_ipus_and_says_how_to_leave_them(tmp_path, shards, poptorch, capsys):
    changes = {**EXACT, **GEOMETRY, "device": "auto", "ipu__executable_cache_dir": tmp_path / "exe"}
    assert main(arguments(tmp_path, shards, **changes)) == 0
    assert "device: ipu (4 Mk2 IPUs)" in capsys.readouterr().out
    assert (
        main(
            arguments(
                tmp_path, shards, **{**changes, "ipu__replication_factor": 1}, training__output=tmp_path / "other"
            )
        )
        == 2
    )
    errors = capsys.readouterr().err
    assert "training.global_batch_size is 24, expected" in errors and "--device cuda or --device cpu" in errors


def engine_for(tmp_path, shards, **changes):
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe", **changes}
    return make_engine(parse_command_line(arguments(tmp_path, shards, **changes)), "ipu")


@pytest.mark.slow
def test_a_serialized_weights_moments_come_back_whole(tmp_path, shards, poptorch):
    engine = engine_for(tmp_path, shards, ipu__embedding_serialization_factor=3)
    engine.step(unpacked_batch(random_samples(np.random.default_rng(), 24, LENGTH, MASKS, VOCAB)), 0.01, 1)
    parts = [name for name in engine.optimizer.state_dict()["ipu_state"] if "Slice" in name]
    assert len(parts) == 2 * 3
    moments, weights = engine.optimizer_state(), engine.weights()
    assert {name.rsplit(".", 1)[0]: tensor.shape for name, tensor in moments.items()} == {
        name: t.shape for name, t in weights.items()
    }


@pytest.mark.slow
def test_device_iterations_are_steps_one_after_the_other(tmp_path, shards, poptorch):
    steps = {"training__log_every": 2, "training__save_every": 2, "training__max_steps": 4}
    batches = [unpacked_batch(random_samples(np.random.default_rng(), 24, LENGTH, MASKS, VOCAB)) for _ in range(2)]
    one, two = engine_for(tmp_path, shards, **steps), engine_for(tmp_path, shards, **steps, ipu__device_iterations=2)
    metrics = [one.step(batch, 0.01, step + 1) for step, batch in enumerate(batches)]
    both = two.step({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, 0.01, 2)
    for name, value in both.items():
        assert value == pytest.approx(sum(float(one[name]) for one in metrics) / 2, rel=1e-5)
    for name, tensor in two.weights().items():
        assert torch.equal(tensor, one.weights()[name]), name
    assert one.steps_done == two.steps_done == 2


@pytest.mark.slow
def test_a_run_with_device_iterations_takes_their_steps_and_samples(tmp_path, shards, poptorch, capsys):
    changes = {
        **EXACT,
        **GEOMETRY,
        "training__max_steps": 4,
        "ipu__device_iterations": 2,
        "training__log_every": 2,
        "training__save_every": 4,
        "ipu__executable_cache_dir": tmp_path / "exe",
    }
    assert main(arguments(tmp_path, shards, **changes)) == 0
    assert [(line["step"], line["samples_seen"]) for line in read_lines(tmp_path)] == [(2, 48), (4, 96)]
    output = capsys.readouterr().out
    assert (
        "global batch: 24 samples in 24 rows" in output
        and "12 micro-batches" in output
        and "4 steps are 0.96 epochs" in output
    )


def test_what_is_fed_is_the_loaders_memory(tmp_path, shards, poptorch, monkeypatch):
    engine = engine_for(tmp_path, shards)
    batch, fed = unpacked_batch(random_samples(np.random.default_rng(), 24, LENGTH, MASKS, VOCAB)), []
    engine.prepare()
    monkeypatch.setattr(
        type(engine.training), "__call__", lambda self, *tensors: fed.extend(tensors) or [torch.zeros(2)] * 5
    )
    engine.step(batch, 0.01, 1)
    assert [tensor.data_ptr() for tensor in fed] == [array.__array_interface__["data"][0] for array in batch.values()]
    assert {tensor.dtype for tensor in fed} == {torch.int32, torch.float32}


def test_compile_only_needs_neither_ipus_nor_data(tmp_path, shards, poptorch, engines, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_IPUS", "0")
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe", "data__files": "nothing"}
    assert main(arguments(tmp_path, shards, **changes) + ["--compile-only"]) == 0
    assert (
        "compiled into" in capsys.readouterr().out and os.listdir(tmp_path / "exe") and not (tmp_path / "run").exists()
    )
    assert engines[-1].training.options.called["useOfflineIpuTarget"] == 2
    assert main(arguments(tmp_path, shards, **changes)) == 2
    assert "finds 0 IPUs, expected 4" in capsys.readouterr().err


def poprun(words, folder, replicas=2):
    """(exit status, standard output, standard error) of each of two processes."""
    folder.mkdir()
    started = []
    for index in (0, 1):
        environment = dict(
            os.environ,
            PYTHONPATH=python_path(),
            STAND_IN_POPDIST_INSTANCES="2",
            STAND_IN_POPDIST_INDEX=str(index),
            STAND_IN_POPDIST_TOTAL_REPLICAS=str(replicas),
            STAND_IN_POPDIST_FOLDER=str(folder),
        )
        started.append(
            subprocess.Popen(
                [sys.executable, os.path.join(ROOT, "run_pretraining.py")] + [str(word) for word in words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120) for process in started]
    return [(process.returncode,) + output for process, output in zip(started, outputs)]


@pytest.mark.slow
def test_two_processes_of_poprun_do_what_one_does(tmp_path, shards, poptorch):
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe"}
    changes.update(ipu__device_iterations=2, training__log_every=2, training__save_every=4, training__max_steps=4)
    assert main(arguments(tmp_path, shards, **changes, training__output=tmp_path / "one")) == 0
    words = arguments(tmp_path, shards, **changes, ipu__instances=2, training__output=tmp_path / "two")
    first, second = poprun(words, tmp_path / "meet")
    assert first[0] == second[0] == 0, (first, second)
    assert "process 0 of 2" in first[1] and second[1] == ""
    one, two = newest(tmp_path, "one"), newest(tmp_path, "two")
    assert all(
        (two[name] - one[name]).norm() <= 1e-5 * one[name].norm() for name in one if not name.endswith("key.bias")
    )
    assert len(read_lines(tmp_path, "two")) == 2
    again = poprun(words + ["--resume", "auto"], tmp_path / "again")  # done already: no process waits for another
    assert (
        [status for status, _, _ in again] == [0, 0]
        and "nothing to do" in again[0][1]
        and not os.listdir(tmp_path / "again")
    )


@pytest.mark.parametrize(
    "replicas, message",
    [
        (4, "ipu.replication_factor is 2, and poprun started 4 replicas: poprun --num-replicas 2"),
        (2, "ipu.instances is 1, and poprun started 2 processes: poprun --num-instances 1 ..., or --ipu.instances 2"),
    ],
)
def test_poprun_has_to_start_the_configs_replicas_and_processes(tmp_path, shards, replicas, message):
    words = arguments(tmp_path, shards, **EXACT, **GEOMETRY, ipu__executable_cache_dir=tmp_path / "exe")
    for status, _, errors in poprun(words, tmp_path / "meet", replicas):
        assert status == 2 and message in errors


def options_of(poptorch, ipu, training=True, compile_only=False, ipu_model=False):
    stages = make_stages(ipu.layers_per_ipu, ipu.matmul_proportion)
    config = Config(ipu=ipu, compile_only=compile_only, ipu_model=ipu_model)
    return dict(make_options(poptorch, stages, config, True, 42, training).called)


def test_the_recipes_options_reach_poptorch(poptorch):
    called = options_of(poptorch, parse_command_line(["--config", "pod16_phase2.json"]).ipu)
    strategy, location = called.pop("setExecutionStrategy"), called.pop("TensorLocations.setOptimizerLocation")
    assert strategy._count == 5 and location.called == {"useOnChipStorage": True, "useReplicatedTensorSharding": True}
    assert called == {
        "replicationFactor": 4,
        "autoRoundNumIPUs": True,
        "relaxOptimizerAttributesChecks": True,
        "randomSeed": 42,
        "outputMode": poptorch.OutputMode.Sum,
        "deviceIterations": 1,
        "setAvailableMemoryProportion": {"IPU0": 0.22, "IPU1": 0.22, "IPU2": 0.22, "IPU3": 0.22},
        "enableExecutableCaching": "./exe_cache",
        "Precision.setPartialsType": torch.float16,
        "Precision.enableStochasticRounding": True,
        "Training.gradientAccumulation": 512,
        "Training.accumulationAndReplicationReductionType": poptorch.ReductionType.Mean,
        "_Popart.disableGradAccumulationTensorStreams": True,
        "_Popart.accumulateOuterFragmentSettings.schedule": 3,
        "_Popart.accumulateOuterFragmentSettings.excludedVirtualGraphs": ["0"],
        "_Popart.subgraphCopyingStrategy": 1,
        "_Popart.scheduleNonWeightUpdateGradientConsumersEarly": True,
        "_Popart.setEngineOptions": {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"},
        "_Popart.setPatterns": {
            "TiedGather": True,
            "TiedGatherAccumulate": True,
            "UpdateInplacePrioritiesForIpu": True,
            "LambSerialisedWeight": True,
        },
    }


@pytest.mark.parametrize(
    "changes, key, value",
    [
        ({"automatic_loss_scaling": True}, "Training.setAutomaticLossScaling", True),
        ({"stochastic_rounding": False}, "Precision.enableStochasticRounding", False),
        ({"enable_half_partials": False}, "Precision.setPartialsType", torch.float32),
        ({"synthetic_data": True}, "enableSyntheticData", True),
        ({"executable_cache_dir": "elsewhere"}, "enableExecutableCaching", "elsewhere"),
    ],
)
def test_a_setting_reaches_poptorch(poptorch, changes, key, value):
    assert options_of(poptorch, dataclasses.replace(IpuConfig(), **changes))[key] == value


@pytest.mark.parametrize(
    "changes, value",
    [
        ({"optimizer_state_offchip": True}, {"useOnChipStorage": False, "useReplicatedTensorSharding": True}),
        ({"replicated_tensor_sharding": False}, {"useOnChipStorage": True, "useReplicatedTensorSharding": False}),
        ({"replication_factor": 1}, {"useOnChipStorage": True, "useReplicatedTensorSharding": False}),
    ],
)
def test_the_place_of_the_moments_reaches_poptorch(poptorch, changes, value):
    assert (
        options_of(poptorch, dataclasses.replace(IpuConfig(), **changes))["TensorLocations.setOptimizerLocation"].called
        == value
    )


@pytest.mark.parametrize("processes, splits", [(2, True), (4, False)])
def test_poprun_splits_the_moments_over_the_replicas_of_a_process(poptorch, monkeypatch, processes, splits):
    for name, value in (("INSTANCES", processes), ("INDEX", 0), ("TOTAL_REPLICAS", 4)):
        monkeypatch.setenv(f"STAND_IN_POPDIST_{name}", str(value))
    location = options_of(poptorch, IpuConfig())["TensorLocations.setOptimizerLocation"]
    assert location.called["useReplicatedTensorSharding"] == splits


@pytest.mark.parametrize("slices", [1, 2])
def test_a_ratio_for_each_slice_is_one_that_no_pattern_adds_up(poptorch, slices):
    config = Config(optimizer=OptimizerConfig(trust_ratio_slices=slices), ipu=IpuConfig())
    stages = make_stages(config.ipu.layers_per_ipu, config.ipu.matmul_proportion)
    called = make_options(poptorch, stages, config, True, 42, True).called
    assert called["_Popart.setPatterns"]["LambSerialisedWeight"] == (slices == 1)


def test_a_profile_is_also_made_of_what_does_not_fit(poptorch):
    engine_options = options_of(poptorch, dataclasses.replace(IpuConfig(), profile_folder="profile"))[
        "_Popart.setEngineOptions"
    ]
    assert engine_options["autoReport.all"] == engine_options["debug.allowOutOfMemory"] == "true"
    assert engine_options["autoReport.directory"] == "profile"


def test_the_simulator_needs_no_ipus_and_keeps_no_executable(tmp_path, shards, poptorch, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_IPUS", "0")
    called = options_of(poptorch, IpuConfig(), ipu_model=True)
    assert called["useIpuModel"] is True and "enableExecutableCaching" not in called
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe"}
    assert main(arguments(tmp_path, shards, **changes) + ["--compile-only", "--ipu-model"]) == 2
    assert "ipu_model is true" in capsys.readouterr().err
    assert main(arguments(tmp_path, shards, **changes) + ["--ipu-model"]) == 0
    assert "device: ipu (PopTorch without hardware)" in capsys.readouterr().out and len(read_lines(tmp_path)) == 3


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("begun, resume", [(0, "never"), (1, "auto")])
@pytest.mark.slow
def test_a_run_on_made_up_data_shows_its_speed_alone_never_diverges_and_leaves_the_runs_folder_as_it_is(
    tmp_path, shards, poptorch, capsys, begun, resume
):
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe", "training__save_every": 1}
    changes.update(data__files=shards / "train-00000.h5", data__held_out_files=shards / "train-00001.h5", resume=resume)
    if begun:
        assert main(arguments(tmp_path, shards, **changes, training__stop_at_step=begun)) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert main(arguments(tmp_path, shards, **changes, ipu__synthetic_data="true")) == 0
    assert contents(tmp_path / "run") == before and bool(before) == bool(begun)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"] and all("seq/s" in line for line in lines)
    assert not any(word in line for line in lines for word in ("loss", "mlm", "nan"))
    assert "IPUs make up their input, so no losses are reported and nothing is saved" in output
    # The run itself begins, or goes on, as if nothing had been.
    assert main(arguments(tmp_path, shards, **changes)) == 0
    assert main(arguments(tmp_path, shards, **changes, training__output=tmp_path / "other")) == 0
    for path in ("model.safetensors", "optimizer.safetensors"):
        one, other = (os.path.join(checkpoints(tmp_path, run)[-1], path) for run in ("run", "other"))
        assert pathlib.Path(one).read_bytes() == pathlib.Path(other).read_bytes()
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(tmp_path, "other"))


def test_a_stopped_run_on_made_up_data_names_no_step_to_go_on_from(tmp_path, shards, poptorch, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(IpuEngine, "step", interrupt)
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe", "ipu__synthetic_data": "true"}
    assert main(arguments(tmp_path, shards, **changes)) == 130
    output = capsys.readouterr().out
    assert "stopped after step 0 of 3\n" in output and not (tmp_path / "run").exists()


def test_made_up_data_of_ipus_is_none_of_the_cpus(tmp_path, shards):
    assert main(arguments(tmp_path, shards, **{**EXACT, "ipu__synthetic_data": "true"})) == 0
    assert all(line["loss"] > 0 for line in read_lines(tmp_path)) and newest(tmp_path, "run")


@pytest.mark.parametrize("place", ["_need_ipus", "copyWeightsToDevice", "_write_state"])
def test_a_compilation_that_was_interrupted_is_made_again(tmp_path, shards, poptorch, monkeypatch, place):
    batch = unpacked_batch(random_samples(np.random.default_rng(), 24, LENGTH, MASKS, VOCAB))
    expected, engine = engine_for(tmp_path, shards), engine_for(tmp_path, shards)
    expected.step(batch, 0.01, 1)
    wrapped, uninterrupted = poptorch.PoplarExecutor, getattr(poptorch.PoplarExecutor, place)

    def interrupt(executor):
        monkeypatch.setattr(wrapped, place, uninterrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr(wrapped, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step(batch, 0.01, 1)
    engine.step(batch, 0.01, 1)
    assert all(torch.equal(tensor, expected.weights()[name]) for name, tensor in engine.weights().items())


def test_a_loaded_state_is_written_without_leaving_the_ipus_and_without_a_warning(
    tmp_path, shards, poptorch, monkeypatch, caplog
):
    first, second = (unpacked_batch(random_samples(np.random.default_rng(), 24, LENGTH, MASKS, VOCAB)) for _ in "ab")
    engine, other = engine_for(tmp_path, shards), engine_for(tmp_path, shards)
    engine.step(first, 0.01, 1)
    other.load_weights({name: tensor.clone() for name, tensor in engine.weights().items()})
    other.load_optimizer_state({name: tensor.clone() for name, tensor in engine.optimizer_state().items()}, 0)
    monkeypatch.setattr(poptorch.PoplarExecutor, "detachFromDevice", None)
    for one in (engine, other):
        one.step(second, 0.01, 2)
    assert all(torch.equal(tensor, engine.weights()[name]) for name, tensor in other.weights().items())
    assert all(torch.equal(tensor, engine.optimizer_state()[name]) for name, tensor in other.optimizer_state().items())
    assert not [record for record in caplog.records if record.name == "poptorch" and record.levelname == "WARNING"]


def test_the_optimizers_groups_are_the_recipes(tmp_path, shards, poptorch):
    engine = engine_for(tmp_path, shards, training__precision="auto")
    lamb, names = engine.optimizer, {id(parameter): name for name, parameter in engine.model.named_parameters()}
    assert (
        lamb.bias_correction,
        lamb.loss_scaling,
        lamb.accum_type,
        lamb.first_order_momentum_accum_type,
        lamb.second_order_momentum_accum_type,
    ) == (False, 16384.0, torch.float16, torch.float16, torch.float32)
    assert sum(len(group["params"]) for group in lamb.param_groups) == len(names)
    for group in lamb.param_groups:
        assert set(group) == {
            "params",
            "lr",
            "betas",
            "eps",
            "weight_decay",
            "max_weight_norm",
        }  # PopTorch ignores others
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.01), name
            assert (group["max_weight_norm"] == 0.0) == name.endswith("bias"), name
    assert lamb.variable_attrs.isConstant("weight_decay") and not lamb.variable_attrs.isConstant("lr")


@pytest.mark.parametrize("transposed", [False, True])
def test_moments_of_a_serialized_weight_are_found_by_their_parts(transposed):
    parameters = {"word.weight": torch.zeros(6, 4), "layer.weight": torch.zeros(3, 3), "layer.bias": torch.zeros(3)}
    moments = {
        f"{name}.{key}": torch.rand(tensor.shape)
        for name, tensor in parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    state = {"Step___x": torch.zeros(1)}
    for prefix, dtype in (("Accl1___", torch.float16), ("Accl2___", torch.float32)):
        for name in ("layer.weight", "layer.bias"):
            state[prefix + "model.graph." + name] = torch.zeros(parameters[name].shape, dtype=dtype)
        for name in ("/2", "", "/1"):  # in no order
            state[prefix + "heads/MatMul:0_Slice:0" + name] = torch.zeros((4, 2) if transposed else (2, 4), dtype=dtype)
    written = write_state("lamb", state, moments, parameters)
    assert all(
        written[name].dtype == tensor.dtype and written[name].shape == tensor.shape and written[name].is_contiguous()
        for name, tensor in state.items()
    )
    part = written["Accl2___heads/MatMul:0_Slice:0/1"]
    assert torch.equal(part.t() if transposed else part, moments["word.weight.exp_avg_sq"][2:4])
    for name, tensor in read_state("lamb", written, parameters).items():
        assert torch.equal(tensor, moments[name].half().float() if name.endswith("exp_avg") else moments[name]), name


@pytest.mark.parametrize(
    "names, shapes",
    [
        (["MatMul__t5", "MatMul__t7", "MatMul__t6"], [(2, 4)] * 3),  # parts of an unknown order
        (["MatMul", "MatMul/1"], [(4, 4), (2, 4)]),  # parts of unequal size
        (["MatMul", "Other/1"], [(3, 4)] * 2),  # of different products
        (["MatMul", "MatMul/1", "MatMul/2"], [(4, 2)] * 2 + [(2, 4)]),
        ([], []),
    ],
)
def test_moments_that_cannot_be_told_apart_are_an_error(names, shapes):
    state = {
        prefix + name: torch.zeros(shape) for prefix in ("Accl1___", "Accl2___") for name, shape in zip(names, shapes)
    }
    with pytest.raises(InputError, match="for word.weight, expected one tensor for each parameter"):
        read_state("lamb", state, {"word.weight": torch.zeros(6, 4)})


def test_square_parts_of_a_serialized_weight_are_not_guessed():
    state = {prefix + name: torch.zeros(4, 4) for prefix in ("Accl1___", "Accl2___") for name in ("MatMul", "MatMul/1")}
    with pytest.raises(InputError, match="ipu.embedding_serialization_factor 1 avoids it"):
        read_state("lamb", state, {"word.weight": torch.zeros(8, 4)})


def test_a_moment_of_another_shape_than_its_parameter_is_an_error():
    state = {prefix + "model.graph.word.weight": torch.zeros(4, 6) for prefix in ("Accl1___", "Accl2___")}
    with pytest.raises(InputError, match="for word.weight"):
        read_state("lamb", state, {"word.weight": torch.zeros(6, 4)})


def test_a_resumed_run_draws_other_dropout_than_its_first_steps(tmp_path, shards, poptorch, engines):
    changes = {**EXACT, **GEOMETRY, "ipu__executable_cache_dir": tmp_path / "exe", "training__max_steps": 4}
    for stop in (2, 4):
        assert main(arguments(tmp_path, shards, **changes, training__stop_at_step=stop, resume="auto")) == 0
        assert engines[-1].training.options.called["randomSeed"] == 42 + stop - 2


def test_a_checkpoint_between_two_calls_is_an_error(tmp_path, shards, poptorch, capsys):
    assert main(arguments(tmp_path, shards, **{**EXACT, "training__max_steps": 6}, training__stop_at_step=3)) == 0
    changes = {
        **EXACT,
        **GEOMETRY,
        "training__max_steps": 6,
        "ipu__device_iterations": 2,
        "training__log_every": 2,
        "training__save_every": 2,
        "ipu__executable_cache_dir": tmp_path / "exe",
        "resume": "auto",
    }
    assert main(arguments(tmp_path, shards, **changes)) == 2
    assert "expected a divisor of 3, the step of" in capsys.readouterr().err
