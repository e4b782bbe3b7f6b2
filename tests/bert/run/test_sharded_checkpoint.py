"""Checkpoints of processes that each hold a part: whole or not at all, and the same as those of one process."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from bert.config import Config
from bert.export import main as export
from bert.run.checkpoint import (
    begin_checkpoint,
    list_checkpoints,
    load_optimizer_state,
    load_weights,
    read_safetensors,
    save_checkpoint,
)
from bert.run.curve import read_metrics
from bert.run.sharded_checkpoint import check_all_there, write_model
from bert.run.shards import Shards
from data.errors import InputError
from run_pretraining import main as train
from tests import ROOT
from tests.bert.model.test_model import make_perturbed_model, small_config
from tests.bert.run.runs import arguments, checkpoints, make_shards, saved_step
from tests.bert.run.test_checkpoint import WORDS, describe

SCRIPT = os.path.join(ROOT, "tests", "bert", "run", "sharded_process.py")


def processes(number, *words):
    """(exit statuses, what they said) of so many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = dict(WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    command, pipes = [sys.executable, SCRIPT, *map(str, words)], dict(stdout=-1, stderr=subprocess.STDOUT, text=True)
    started = [
        subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank)}, **pipes) for rank in range(number)
    ]
    try:
        said = [process.communicate(timeout=60)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(weights, optimizer's state, a checkpoint of one process, the folder with those of three, what those said)."""
    folder = tmp_path_factory.mktemp("sharded")
    config = small_config(layers=2)
    model = make_perturbed_model(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {}
    for i, (name, weight) in enumerate(weights.items()):
        if "pooler" not in name:  # as if it never had a gradient
            numbers = {"step": torch.tensor(float(i)), "count": torch.tensor([i, 2, 3])}
            state.update({f"{name}.{key}": value for key, value in {"exp_avg": weight + 1, **numbers}.items()})
    saved_state = {"step": 7, "samples_seen": 70, "config": dataclasses.asdict(Config(model=config))}
    whole = save_checkpoint(str(folder / "one"), saved_state, weights, state, describe(model, config), WORDS, 1)
    (folder / "three").mkdir()
    ended, said = processes(3, whole, folder / "three")
    assert ended == [0, 0, -9], said
    said = [json.loads((folder / "three" / f"{rank}.json").read_text()) for rank in (0, 1)]
    return weights, state, whole, folder / "three", said


def steps(folder):
    return [os.path.basename(path) for path in list_checkpoints(str(folder))]


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype, name


@pytest.mark.slow
def test_any_number_of_processes_loads_what_any_number_saved(saved):
    weights, state, whole, folder, said = saved
    for told in said:
        loads = {name: results for name, results in told.items() if name.startswith("step")}
        assert len(loads) == 9 and all(map(all, loads.values())), loads
    for path in list_checkpoints(str(folder)):  # in this process alone
        assert_same(load_weights(path, weights), weights)
        assert_same(load_optimizer_state(path), state)
        assert_same(load_optimizer_state(path, weights), state)
        some = {name: weights[name] for name in list(weights)[:3]}
        assert {name.rpartition(".")[0] for name in load_optimizer_state(path, some)} == set(some)


@pytest.mark.slow
def test_what_fails_in_one_process_is_said_by_the_first_and_ends_all(saved):
    *_, folder, (first, second) = saved
    kind, message = first["full"]
    assert kind == "OSError" and f"{folder}: the checkpoint of step 3 cannot be written, says process 1" in message
    assert "No space left" in message and second["full"] == ["SystemExit", "2"]
    assert first["saved"] == second["saved"] == 2


@pytest.mark.slow
def test_a_process_that_is_killed_as_it_writes_leaves_no_checkpoint(saved, tmp_path):
    *_, folder, said = saved
    assert all("has ended or hangs" in told["killed"] for told in said)
    assert steps(folder) == ["step_00000001", "step_00000002"]
    left = tmp_path / "left"
    shutil.copytree(folder, left)
    assert os.path.isdir(left / ".step_00000004.incomplete")
    os.rename(begin_checkpoint(str(left), 5), left / "begun")
    assert not os.path.exists(left / ".step_00000004.incomplete") and len(steps(left)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_export_has_the_same_weights_for_transformers(saved, tmp_path, step, capsys):
    weights, _, whole, folder, _ = saved
    path = ([whole] + list_checkpoints(str(folder)))[step]
    out = str(tmp_path / "out")
    assert export([path, out, "--license", "mit"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert_same(read_safetensors(os.path.join(out, "model.safetensors")), weights)
    model, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert_same(
        {f"bert.{name}": tensor for name, tensor in model.state_dict().items() if "position_ids" not in name},
        {name: tensor for name, tensor in weights.items() if name.startswith("bert.")},
    )
    assert len(AutoTokenizer.from_pretrained(out)) == len(WORDS)
    capsys.readouterr()
    assert export([path, out, "--license", "mit"]) == 2 and "is there already" in capsys.readouterr().err
    assert export([str(tmp_path), out + "2"]) == 2 and "expected the folder of a checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_model_may_be_made_in_the_checkpoint_itself(saved, tmp_path):
    weights, state, _, folder, _ = saved
    path = tmp_path / "step"
    shutil.copytree(list_checkpoints(str(folder))[0], path)
    write_model(str(path), str(path / "model.safetensors"))
    shutil.rmtree(path / "weights")  # it does without
    assert_same(load_weights(str(path), weights), weights)
    assert_same(load_optimizer_state(str(path)), state)
    AutoModel.from_pretrained(path)


@pytest.mark.slow
def test_shards_that_cannot_be_used_are_named(saved, tmp_path):
    weights, _, _, folder, _ = saved
    path = tmp_path / "step"
    shutil.copytree(list_checkpoints(str(folder))[1], path)
    with pytest.raises(InputError, match=r"bert.pooler.dense.weight is \[48, 48\], expected \[3, 48\]"):
        load_weights(str(path), {**weights, "bert.pooler.dense.weight": torch.zeros(3, 48)})
    with pytest.raises(InputError, match="weights: bert.more is missing"):
        load_weights(str(path), {**weights, "bert.more": torch.zeros(3)})
    written = Shards(str(path / "weights")).tensors
    for part, load in (
        ("weights", lambda: load_weights(str(path), weights)),
        ("optimizer", lambda: load_optimizer_state(str(path))),
    ):
        shard = sorted((path / part).iterdir())[1]
        data = shard.read_bytes()
        shard.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=f"{shard.name}: cannot be read as safetensors"):
            load()
        shard.unlink()
        with pytest.raises(InputError, match=f"{part}/{shard.name}: no such file"):
            load()
    with pytest.raises(OSError, match="has 0 values of .*, expected .*disk"):
        check_all_there(str(path / "weights"), written)


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_any_checkpoint_and_saves_where_it_is_stopped(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dropout = {f"model__{name}_dropout_prob": 0 for name in ("hidden", "attention_probs")}
    steps_and_saves = dict(training__max_steps=5, training__save_every=2, parallel__timeout=10)
    shards = make_shards(tmp_path / "shards")
    data = dict(data__files=shards / "train-00000.h5", data__held_out_files=shards / "train-00001.h5")
    words = arguments(tmp_path, shards, **dropout, **steps_and_saves, **data)
    one, other = ([*words, "--training.output", str(tmp_path / name)] for name in ("one", "other"))
    assert train(one) == 0
    other += ["--training.evaluate_every", "1"]  # which changes nothing
    assert train([*other, "--training.stop_at_step", "1"]) == 0
    ended, said = processes(2, "run", "4", *other, "--resume", "auto", "--parallel.pipeline", "2")
    assert ended == [143, 143] and "stopped after step 3 of 5. To go on from step 3" in said[0], said
    assert [saved_step(path) for path in checkpoints(tmp_path, "other")] == [1, 2, 3]
    assert train([*other, "--resume", "auto"]) == 0  # alone
    held_out = read_metrics(str(tmp_path / "other" / "held_out.jsonl"))
    assert [line["step"] for line in held_out] == [1, 2, 3, 4, 5]
    (expected,) = read_metrics(str(tmp_path / "one" / "held_out.jsonl"))
    assert held_out[-1]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    last, others = (load_file(checkpoints(tmp_path, run)[-1] + "/model.safetensors") for run in ("one", "other"))
    for name, weight in last.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
            assert (others[name] - weight).norm() <= 1e-5 * weight.norm(), name
    torch.set_num_threads(threads)
