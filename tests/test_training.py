"""Runs: split invariance, resume, checkpoints, interrupts, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from bert.checkpoint import list_checkpoints, read_safetensors
from bert.config import parse_command_line
from bert.training import make_engine, train
from data.rows import unpacked_batch
from data.shards import open_shards, read_samples, vocab_sha256, write_shard
from data.tokenizer import SPECIAL_WORDS
from run_pretraining import main
from tests.make_samples import random_samples

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOCAB, LENGTH, MASKS = 120, 32, 5
MODEL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": LENGTH, "layer_norm_eps": 0.001}


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def make_shards(folder, samples=100, seed=0):
    folder.mkdir()
    words = list(SPECIAL_WORDS) + ["word%d" % i for i in range(VOCAB - len(SPECIAL_WORDS))]
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    rng = np.random.default_rng(seed)
    for i, count in enumerate((samples - 33, 33)):
        write_shard(str(folder / ("train-%05d.h5" % i)), random_samples(rng, count, LENGTH, MASKS, VOCAB), VOCAB, vocab_sha256(words), {})
    return folder


def arguments(tmp_path, shards, **changes):
    values = {
        "device": "cpu", "model": dict(MODEL), "optimizer": {"learning_rate": 0.01, "warmup_ratio": 0.2},
        "data": {"files": str(shards / "train-*.h5"), "sequence_length": LENGTH, "mask_tokens": MASKS},
        "training": {"global_batch_size": 24, "micro_batch_size": 8, "max_steps": 12, "log_every": 1, "save_every": 100,
                     "compile": "off", "output": str(tmp_path / "run")},
        "ipu": {"layers_per_ipu": [0, 2]},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(values))
    return ["--config", str(path)] + [word for key, value in changes.items() for word in ("--" + key.replace("__", "."), str(value))]


def checkpoints(tmp_path, run="run"):
    return list_checkpoints(str(tmp_path / run / "checkpoints"))


def assert_same_state(one, other):
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = read_safetensors(os.path.join(one, name)), read_safetensors(os.path.join(other, name))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)


def read_lines(tmp_path, run="run"):
    return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]


def test_one_global_batch_gives_the_same_gradients_for_any_micro_batch(tmp_path, shards):
    samples = random_samples(np.random.default_rng(), 16, LENGTH, MASKS, VOCAB)
    samples.nsp_labels[:] = np.arange(16) % 4 == 0  # half and half would cancel the NSP bias's gradient down to its rounding
    batch = unpacked_batch(samples)
    found = {}
    for size in (1, 4, 16):
        config = parse_command_line(arguments(tmp_path, shards, training__micro_batch_size=size, model__hidden_dropout_prob=0,
                                              model__attention_probs_dropout_prob=0))
        engine = make_engine(config, "cpu")
        metrics = engine.step(batch, 0.0, 1)
        found[size] = {name: p.grad for name, p in engine.graph.named_parameters()}, metrics
    for size in (4, 16):
        for name, gradient in found[1][0].items():
            if not name.endswith("attention.self.key.bias"):  # zero but for rounding
                assert (found[size][0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, value in found[1][1].items():
            assert torch.isclose(found[size][1][name], value, rtol=1e-5), name


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, shards, compiled):
    options = {"training__compile": compiled}
    assert main(arguments(tmp_path, shards, **options)) == 0
    assert main(arguments(tmp_path, shards, **options, training__output=tmp_path / "other", training__stop_at_step=5)) == 0
    assert [os.path.basename(path) for path in checkpoints(tmp_path, "other")] == ["step_00000005"]
    torch.rand(3)  # what else draws random numbers does not matter
    assert main(arguments(tmp_path, shards, **options, training__output=tmp_path / "other", resume="auto")) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "other")[-1])
    timing = ("sequences_per_second", "data_wait_fraction")
    strip = lambda lines: [{key: value for key, value in line.items() if key not in timing} for line in lines]
    assert strip(read_lines(tmp_path)) == strip(read_lines(tmp_path, "other"))
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, 13))


def test_dropout_is_on_in_training_and_differs_between_steps_and_micro_batches(tmp_path, shards):
    config = parse_command_line(arguments(tmp_path, shards))
    engine = make_engine(config, "cpu")
    samples = random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB)
    batch = unpacked_batch(samples)
    evaluated = engine.evaluate(batch)["mlm_loss"]
    losses = [engine.step(batch, 0.0, step)["mlm_loss"] for step in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1] and evaluated not in losses
    assert engine.evaluate(batch)["mlm_loss"] == evaluated
    seen = []
    engine.graph.register_forward_hook(lambda graph, inputs, outputs: seen.append(outputs[1]["mlm_loss"].item()))
    engine.step({name: np.concatenate([array, array]) for name, array in batch.items()}, 0.0, 1)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_metrics_have_every_field_and_mean_what_they_say(tmp_path, shards):
    assert main(arguments(tmp_path, shards, training__log_every=4)) == 0
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert list(lines[0]) == ["step", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "learning_rate",
                              "sequences_per_second", "data_wait_fraction", "samples_seen"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["mlm_loss"] + line["nsp_loss"]) and line["samples_seen"] == 24 * line["step"]
        assert 0 <= line["mlm_accuracy"] <= 1 and 0 <= line["data_wait_fraction"] <= 1 and line["sequences_per_second"] > 0
    assert abs(lines[0]["mlm_loss"] - np.log(VOCAB)) < 1 and abs(lines[0]["nsp_loss"] - np.log(2)) < 0.3
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "run" / "tensorboard"))
    assert main(arguments(tmp_path, shards, training__output=tmp_path / "every", training__log_every=1)) == 0
    every = read_lines(tmp_path, "every")
    assert lines[1]["mlm_loss"] == pytest.approx(np.mean([line["mlm_loss"] for line in every[4:8]]))


def test_only_the_newest_checkpoints_stay_and_no_half_one(tmp_path, shards):
    (tmp_path / "run" / "checkpoints" / ".step_00000001.incomplete").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main(arguments(tmp_path, shards)) == 2
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints" / ".step_00000001.incomplete").rmdir()
    (tmp_path / "run" / "checkpoints").rmdir()
    assert main(arguments(tmp_path, shards, training__save_every=2, training__keep_checkpoints=2)) == 0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_00000010", "step_00000012"]


def test_a_save_that_is_killed_leaves_the_older_checkpoint_and_resume_clears_it(tmp_path, shards):
    assert main(arguments(tmp_path, shards, training__stop_at_step=3)) == 0
    half = tmp_path / "run" / "checkpoints" / ".step_00000006.incomplete"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert main(arguments(tmp_path, shards, resume="auto", training__stop_at_step=4)) == 0
    assert sorted(os.listdir(half.parent)) == ["step_00000003", "step_00000004"]


def test_a_finished_run_is_left_alone(tmp_path, shards):
    assert main(arguments(tmp_path, shards)) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(arguments(tmp_path, shards, resume="auto")) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on_as_if_nothing_had_been(tmp_path, shards, number):
    assert main(arguments(tmp_path, shards)) == 0
    words = arguments(tmp_path, shards, training__output=tmp_path / "other")
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "run_pretraining.py")] + words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    code = process.wait()
    if code == 0:
        pytest.skip("the run was over before the signal came")
    assert code == 128 + number and "--resume auto" in rest
    assert 2 <= json.load(open(os.path.join(checkpoints(tmp_path, "other")[-1], "training_state.json")))["step"] < 12
    assert main(words + ["--resume", "auto"]) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "other")[-1])


def test_held_out_samples_are_evaluated_over_all_of_them(tmp_path, shards):
    assert main(arguments(tmp_path, shards, data__held_out_files=shards / "train-00001.h5")) == 0
    found = json.load(open(tmp_path / "run" / "held_out.json"))
    assert found["samples"] == 33 and found["step"] == 12 and found["loss"] == pytest.approx(found["mlm_loss"] + found["nsp_loss"])
    config = parse_command_line(arguments(tmp_path, shards))
    engine = make_engine(config, "cpu")
    engine.load_weights(read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "model.safetensors")))
    path = open_shards([str(shards / "train-00001.h5")])[0].path
    whole = engine.evaluate(unpacked_batch(read_samples(path, 0, 33)))
    for name, value in whole.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5)


def test_phase_2_starts_from_phase_1s_weights(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards)) == 0
    last = checkpoints(tmp_path)[-1]
    config = parse_command_line(arguments(tmp_path, shards, training__output=tmp_path / "two", training__start_from=last,
                                          training__stop_at_step=1, optimizer__learning_rate=1e-30))
    assert train(config) == 1
    before = read_safetensors(os.path.join(last, "model.safetensors"))
    after = read_safetensors(os.path.join(checkpoints(tmp_path, "two")[-1], "model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "starts from %s" % last in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=3)) == 0
    state = json.load(open(tmp_path / "run" / "run.json"))
    state["optimizer.learning_rate"] = 1e30
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    assert main(arguments(tmp_path, shards, resume="auto", optimizer__learning_rate=1e30)) == 1
    assert "loss is" in capsys.readouterr().err
    assert [os.path.basename(path) for path in checkpoints(tmp_path)] == ["step_00000003"]


def bad_inputs():
    yield "no files", {"data__files": "nowhere/train-*.h5"}, ["nowhere/train-*.h5", "python -m data.prepare", "--sequence-length 32"]
    yield "other length", {"data__sequence_length": 16}, ["train-00000.h5", "sequence length 32", "16"]
    yield "small vocabulary", {"model__vocab_size": 100}, ["train-00000.h5", "120", "model.vocab_size is 100"]
    yield "no vocabulary", {"data__vocab": "gone.txt"}, ["gone.txt", "--data.vocab"]
    yield "no start", {"training__start_from": "gone"}, ["gone", "no such folder"]
    yield "no cuda", {"device": "cuda"}, ["CUDA", "--device auto"]


@pytest.mark.parametrize("name, changes, words", list(bad_inputs()), ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_clear_error_before_the_first_step(tmp_path, shards, capsys, name, changes, words):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(arguments(tmp_path, shards, **changes)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_than_the_shards_is_refused(tmp_path, shards, capsys):
    words = (shards / "vocab.txt").read_text().replace("word7\n", "sword\n")
    (tmp_path / "other.txt").write_text(words)
    assert main(arguments(tmp_path, shards, data__vocab=tmp_path / "other.txt")) == 2
    assert "other.txt" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(arguments(tmp_path, shards)) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(arguments(tmp_path, shards, resume="auto", optimizer__learning_rate=0.5)) == 2
    message = capsys.readouterr().err
    assert "run.json" in message and "optimizer.learning_rate is 0.01" in message and "0.5" in message
    (tmp_path / "more").mkdir()
    other = make_shards(tmp_path / "more" / "shards", samples=120)
    assert main(arguments(tmp_path, other, resume="auto")) == 2
    assert "another data set" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_shard_that_vanishes_stops_the_run_with_its_name_and_a_checkpoint(tmp_path, shards):
    words = arguments(tmp_path, shards, training__max_steps=100000, training__log_every=1)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "run_pretraining.py")] + words, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            (shards / "train-00001.h5").unlink()
            break
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "train-00001.h5" in errors and time.monotonic() - began < 20
    assert checkpoints(tmp_path)
