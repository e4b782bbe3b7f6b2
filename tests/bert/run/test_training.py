"""Runs: split invariance, resume, checkpoints, interrupts, bad input."""

import json
import logging
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.torch_devices import Cpu
from bert.run.checkpoint import list_checkpoints, read_safetensors, save_checkpoint
from bert.run.loop import train
from bert.signals import interruptible, protected
from data.loading.shard_files import open_shards
from data.rows import unpacked_batch
from data.shards import read_samples, write_shard
from data.tokenizer import SPECIAL_TOKENS, vocab_sha256
from run_pretraining import main
from tests import ROOT
from tests.make_samples import random_samples

VOCAB, LENGTH, MASKS = 120, 32, 5
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
    "layer_norm_eps": 0.001,
}


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def make_shards(folder, samples=100, seed=0, length=LENGTH, masks=MASKS):
    folder.mkdir()
    words = list(SPECIAL_TOKENS) + [f"word{i}" for i in range(VOCAB - len(SPECIAL_TOKENS))]
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    rng = np.random.default_rng(seed)
    for i, count in enumerate((samples - 33, 33)):
        write_shard(
            str(folder / (f"train-{i:05}.h5")),
            random_samples(rng, count, length, masks, VOCAB),
            VOCAB,
            vocab_sha256(words),
            {},
        )
    return folder


def arguments(tmp_path, shards, **changes):
    values = {
        "device": "cpu",
        "model": dict(MODEL),
        "optimizer": {"learning_rate": 0.01, "warmup_ratio": 0.2},
        "data": {"files": str(shards / "train-*.h5"), "sequence_length": LENGTH, "mask_tokens": MASKS},
        "training": {
            "global_batch_size": 24,
            "micro_batch_size": 8,
            "max_steps": 12,
            "log_every": 1,
            "save_every": 100,
            "compile": "off",
            "output": str(tmp_path / "run"),
        },
        "ipu": {"layers_per_ipu": [0, 2]},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(values))
    return ["--config", str(path)] + [
        word for key, value in changes.items() for word in ("--" + key.replace("__", "."), str(value))
    ]


def start(words):
    """The command as a process of its own, with lines as they come."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "run_pretraining.py")] + [str(word) for word in words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def saved_step(path):
    with open(os.path.join(path, "training_state.json")) as file:
        return json.load(file)["step"]


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


def without_times(lines):
    return [
        {k: v for k, v in line.items() if k not in ("sequences_per_second", "data_wait_fraction")} for line in lines
    ]


def test_one_global_batch_gives_the_same_gradients_for_any_micro_batch(tmp_path, shards):
    samples = random_samples(np.random.default_rng(), 16, LENGTH, MASKS, VOCAB)
    samples.nsp_labels[:] = (
        np.arange(16) % 4 == 0
    )  # half and half would cancel the NSP bias's gradient down to its rounding
    batch = unpacked_batch(samples)
    found = {}
    for size in (1, 4, 16):
        config = parse_command_line(
            arguments(
                tmp_path,
                shards,
                training__micro_batch_size=size,
                model__hidden_dropout_prob=0,
                model__attention_probs_dropout_prob=0,
            )
        )
        engine = make_engine(config, "cpu")
        metrics = engine.step(batch, 0.0, 1)
        found[size] = {name: p.grad for name, p in engine.model.named_parameters()}, metrics
    for size in (4, 16):
        for name, gradient in found[1][0].items():
            if not name.endswith("attention.self.key.bias"):  # zero but for rounding
                assert (found[size][0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, value in found[1][1].items():
            assert torch.isclose(found[size][1][name], value, rtol=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"training__compile": "on"}, marks=pytest.mark.slow),
        {"data__packing": "off"},
        {"data__packing": "rows"},
        {"training__log_every": 4},
        {"data__on_bad_shard": "skip"},
        {"masking": "dynamic"},
        {"training__precision": "bfloat16", "optimizer__schedule": "constant"},
        {"task__nsp": "false", "optimizer__name": "adamw", "optimizer__schedule": "cosine"},
        {"optimizer__name": "adamw", "training__precision": "bfloat16"},
        {"optimizer__name": "muon", "optimizer__schedule": "wsd"},
        {"optimizer__name": "muon", "training__precision": "bfloat16"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()) or "as it is",
)
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, shards, options):
    options, log_every = {"training__max_steps": 8, **options}, options.get("training__log_every", 1)
    if options.get("training__compile") and Cpu().find_compiler() is None:
        pytest.skip("no C++ compiler")
    if options.get("optimizer__name") == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if options.get("data__on_bad_shard"):
        with h5py.File(shards / "train-00001.h5", "a") as file:
            file["input_ids"][5, 1] = VOCAB
    if options.pop("masking", ""):
        for path in shards.glob("*.h5"):
            with h5py.File(path, "a") as file:
                file.attrs.update(
                    {"masking": "dynamic", "mask_share": 0.15, "special_ids": [0, 1, 2, 3, 4], "continuations": ""}
                )
    assert main(arguments(tmp_path, shards, **options)) == 0
    other = {**options, "training__output": tmp_path / "other"}
    assert main(arguments(tmp_path, shards, **other, training__stop_at_step=5)) == 0
    assert [os.path.basename(path) for path in checkpoints(tmp_path, "other")] == ["step_00000005"]
    torch.rand(3)  # what else draws random numbers does not matter
    assert main(arguments(tmp_path, shards, **other, resume="auto")) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "other")[-1])
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(tmp_path, "other"))
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(log_every, 9, log_every))


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
    engine.model.register_forward_hook(lambda graph, inputs, outputs: seen.append(outputs[1]["mlm_loss"].item()))
    engine.step({name: np.concatenate([array, array]) for name, array in batch.items()}, 0.0, 1)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_an_asynchronous_device_gives_the_same_lines_though_each_is_read_a_step_late(tmp_path, shards, monkeypatch):
    seen = []

    class Event:
        def __init__(self):
            self.step = 1 + sum(word.startswith("step") for word in seen)
            seen.append(f"step {self.step}")

        def synchronize(self):
            seen.append(f"wait {self.step}")

    class Asynchronous(Cpu):
        asynchronous = True

        def to_host(self, tensor):
            return tensor.clone(), Event()

    options = {"training__log_every": 2, "training__save_every": 5}
    assert main(arguments(tmp_path, shards, **options)) == 0
    monkeypatch.setattr("bert.engines.Cpu", Asynchronous)
    assert main(arguments(tmp_path, shards, training__output=tmp_path / "other", **options)) == 0
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(tmp_path, "other"))
    # Steps 2 and 4 are read after the next is under way, but for what a checkpoint needs: 5, 10, 12.
    expected = "step 1, step 2, step 3, wait 2, step 4, step 5, wait 4, wait 5, step 6, step 7, wait 6, step 8, step 9"
    assert ", ".join(seen) == expected + ", wait 8, step 10, wait 10, step 11, step 12, wait 12"


def test_in_bfloat16_the_graph_is_the_rounded_masters_and_small_updates_are_not_lost(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards, training__precision="bfloat16")), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB))
    before = {name: tensor.clone() for name, tensor in engine.weights().items()}
    for step in range(1, 4):
        engine.step(batch, 1e-5, step)  # far below bfloat16's resolution
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, engine.master_weights[name].bfloat16()), (
            name
        )
    moved = [name for name, weight in engine.weights().items() if not torch.equal(weight, before[name])]
    assert len(moved) > 0.9 * len(before)
    other = make_engine(parse_command_line(arguments(tmp_path, shards, training__precision="bfloat16")), "cpu")
    other.load_weights(engine.weights())
    assert other.evaluate(batch)["mlm_loss"] == engine.evaluate(batch)["mlm_loss"]


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out_and_counted(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards)), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB))
    assert engine.step(batch, 1e-3, 1)["skipped_updates"] == 0
    before = {**engine.weights(), **engine.optimizer_state()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    batch["nsp_weights"][0] = np.inf
    assert engine.step(batch, 1e-3, 2)["skipped_updates"] == 1
    after = {**engine.weights(), **engine.optimizer_state()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_float8_learns_as_bfloat16_does(tmp_path, shards):
    lines = {}
    for precision in ("bfloat16", "float8"):
        assert (
            main(
                arguments(
                    tmp_path,
                    shards,
                    training__output=tmp_path / precision,
                    training__precision=precision,
                    data__sequence_length=LENGTH,
                )
            )
            == 0
        )
        lines[precision] = [line["loss"] for line in read_lines(tmp_path, precision)]
    assert lines["float8"] != lines["bfloat16"] == pytest.approx(lines["float8"], rel=0.02)


def test_metrics_have_every_field_and_mean_what_they_say(tmp_path, shards):
    assert main(arguments(tmp_path, shards, training__log_every=4)) == 0
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert list(lines[0]) == [
        "step",
        "loss",
        "mlm_loss",
        "nsp_loss",
        "mlm_accuracy",
        "nsp_accuracy",
        "learning_rate",
        "sequences_per_second",
        "data_wait_fraction",
        "samples_seen",
        "skipped_updates",
    ]
    for line in lines:
        assert (
            line["loss"] == pytest.approx(line["mlm_loss"] + line["nsp_loss"])
            and line["samples_seen"] == 24 * line["step"]
        )
        assert (
            0 <= line["mlm_accuracy"] <= 1 and 0 <= line["data_wait_fraction"] <= 1 and line["sequences_per_second"] > 0
        )
    assert abs(lines[0]["mlm_loss"] - np.log(VOCAB)) < 1 and abs(lines[0]["nsp_loss"] - np.log(2)) < 0.3
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "run" / "tensorboard"))
    assert main(arguments(tmp_path, shards, training__output=tmp_path / "every", training__log_every=1)) == 0
    every = read_lines(tmp_path, "every")
    assert lines[1]["mlm_loss"] == pytest.approx(np.mean([line["mlm_loss"] for line in every[4:8]]))


def test_only_the_newest_checkpoints_stay(tmp_path, shards):
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


def test_a_run_that_was_stopped_before_its_end_gets_its_picture_when_it_goes_on(tmp_path, shards):
    assert main(arguments(tmp_path, shards, training__max_steps=3)) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for missing, drawn_again in ((["curve.png"], False), (["state.json"], True)):
        for name in missing:
            (tmp_path / "run" / name).unlink()
        assert main(arguments(tmp_path, shards, training__max_steps=3, resume="auto")) == 0
        assert (tmp_path / "run" / "curve.png").exists() == drawn_again
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_of_before_there_were_tasks_is_left_alone(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__max_steps=2)) == 0
    run = tmp_path / "run"
    (run / "state.json").unlink()  # it had none, its picture came last
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in settings.items() if not k.startswith("task.")}))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(arguments(tmp_path, shards, training__max_steps=2, resume="auto")) == 0
    assert "step 2 of 2 is done already, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_shard_that_is_left_out_is_reported_once_a_run(tmp_path, shards, capsys):
    path = shards / "train-00001.h5"
    path.write_bytes(path.read_bytes()[:-1000])  # cut off: seen before the first step
    skip = {"data__on_bad_shard": "skip", "training__max_steps": 3}
    for changes in ({"training__stop_at_step": 2}, {"resume": "auto"}):
        assert main(arguments(tmp_path, shards, **skip, **changes)) == 0
        said = capsys.readouterr().out
        assert said.count("left out, 1 by now") == said.count("train-00001.h5: cannot be read as HDF5") == 1


def test_a_program_that_trains_says_itself_what_it_shows(tmp_path, shards, caplog, capsys):
    config = parse_command_line(arguments(tmp_path, shards, training__max_steps=1))
    logger = logging.getLogger("bert")
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [], True
    try:
        with caplog.at_level(logging.WARNING):
            logger.setLevel(logging.NOTSET)
            assert train(config) == 1
        assert capsys.readouterr().out == "" and not caplog.records and logger.level == logging.NOTSET
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]


def test_a_signal_during_a_save_is_heeded_after_it_and_nothing_is_saved_twice(tmp_path, shards, monkeypatch):
    def save_and_signal(*values):
        path = save_checkpoint(*values)
        signal.raise_signal(signal.SIGTERM)
        return path

    monkeypatch.setattr("bert.run.loop.save_checkpoint", save_and_signal)
    assert main(arguments(tmp_path, shards, training__save_every=2)) == 128 + signal.SIGTERM
    assert [os.path.basename(path) for path in checkpoints(tmp_path)] == ["step_00000002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on_as_if_nothing_had_been(tmp_path, shards, number):
    words = arguments(tmp_path, shards, training__max_steps=100000, training__log_every=1)
    process = start(words)
    wait_for(process, "step 2/")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "--resume auto" in out
    step = saved_step(checkpoints(tmp_path)[-1])
    assert step >= 2
    until = ["--training.stop_at_step", str(step + 3)]
    assert main(words + until + ["--resume", "auto"]) == 0
    assert main(words + until + ["--training.output", str(tmp_path / "other")]) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "other")[-1])


def test_a_signal_in_an_update_waits_for_its_end_and_one_in_a_pass_does_not(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards)), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(2), 24, LENGTH, MASKS, VOCAB))
    update, kept = engine.optimizer.step, []

    def signal_then_update(learning_rate):
        signal.raise_signal(signal.SIGINT)
        update(learning_rate)

    with interruptible():
        before = {name: tensor.clone() for name, tensor in engine.weights().items()}
        with pytest.raises(KeyboardInterrupt):
            engine.step(batch, 0.1, 1, lambda rows: signal.raise_signal(signal.SIGINT))
        assert engine.steps_done == 0 and all(
            torch.equal(before[name], tensor) for name, tensor in engine.weights().items()
        )
        engine.optimizer.step = signal_then_update
        with pytest.raises(KeyboardInterrupt), protected():
            kept.append(engine.step(batch, 0.1, 1))
        assert engine.steps_done == len(kept) == 1


def test_held_out_samples_are_evaluated_over_all_of_them(tmp_path, shards):
    assert (
        main(
            arguments(
                tmp_path, shards, data__files=shards / "train-00000.h5", data__held_out_files=shards / "train-00001.h5"
            )
        )
        == 0
    )
    found = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert (
        found["samples"] == 33
        and found["step"] == 12
        and found["loss"] == pytest.approx(found["mlm_loss"] + found["nsp_loss"])
    )
    config = parse_command_line(arguments(tmp_path, shards))
    engine = make_engine(config, "cpu")
    engine.load_weights(read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "model.safetensors")))
    path = open_shards([str(shards / "train-00001.h5")])[0].path
    whole = engine.evaluate(unpacked_batch(read_samples(path, 0, 33)))
    for name, value in whole.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5)


def test_phase_2_starts_from_phase_1s_weights(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=2)) == 0
    last = checkpoints(tmp_path)[-1]
    two = {"training__output": tmp_path / "two", "training__start_from": last, "training__stop_at_step": 1}
    assert main(arguments(tmp_path, shards, optimizer__learning_rate=1e-30, **two)) == 0
    before = read_safetensors(os.path.join(last, "model.safetensors"))
    after = read_safetensors(os.path.join(checkpoints(tmp_path, "two")[-1], "model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert f"starts from {last}" in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_run_that_diverges_stops_and_spares_the_checkpoints(tmp_path, shards, capsys, log_every):
    options = {"training__save_every": 3, "training__log_every": log_every}
    assert main(arguments(tmp_path, shards, training__stop_at_step=3, **options)) == 0
    path = os.path.join(checkpoints(tmp_path)[-1], "optimizer.safetensors")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in read_safetensors(path).items()}, path)
    assert main(arguments(tmp_path, shards, resume="auto", **options)) == 1
    message = capsys.readouterr().err
    assert f"--training.start_from {checkpoints(tmp_path)[-1]}" in message and "learning_rate" in message
    assert [os.path.basename(path) for path in checkpoints(tmp_path)] == ["step_00000003"]


def bad_inputs():
    yield "no files at the top", {"data__files": "x-*.h5"}, ["x-*.h5", "--output shards/", "--vocab-size 120"]
    yield (
        "both sets",
        {"data__held_out_files": "{shards}/train-00001.h5"},
        ["train-00001.h5", "data.files and by data.held_out_files"],
    )
    yield "no held-out file", {"data__held_out_files": "gone.h5"}, ["gone.h5", "no such file"]
    yield "output is a file", {"training__output": "{shards}/vocab.txt"}, ["training.output", "is a file"]
    yield (
        "no files",
        {"data__files": "nowhere/train-*.h5"},
        ["nowhere/train-*.h5", "python -m data.prepare", "--sequence-length 32"],
    )
    yield "other length", {"data__sequence_length": 16}, ["train-00000.h5", "sequence length 32", "16"]
    yield "small vocabulary", {"model__vocab_size": 100}, ["train-00000.h5", "120", "model.vocab_size is 100"]
    yield "no vocabulary", {"data__vocab": "gone.txt"}, ["gone.txt", "--data.vocab"]
    yield "no start", {"training__start_from": "gone"}, ["gone", "no such folder"]
    yield "no cuda", {"device": "cuda"}, ["CUDA", "--device auto"]


@pytest.mark.parametrize(
    "name, changes, words", list(bad_inputs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_one_clear_error_before_the_first_step(tmp_path, shards, capsys, name, changes, words):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert (
        main(arguments(tmp_path, shards, **{key: str(value).format(shards=shards) for key, value in changes.items()}))
        == 2
    )
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def damaged_shards():
    def cut_off(path):
        path.write_bytes(path.read_bytes()[:-1000])

    def no_data_set(path):
        with h5py.File(path, "a") as file:
            del file["nsp_labels"]

    def beyond_the_vocabulary(path):
        with h5py.File(path, "a") as file:
            file["input_ids"][5, 1] = VOCAB

    yield cut_off, ["train-00001.h5", "cut off"]
    yield no_data_set, ["train-00001.h5", "nsp_labels", "missing"]
    yield beyond_the_vocabulary, ["train-00001.h5", "sample 5", "120"]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("damage, words", list(damaged_shards()))
def test_a_damaged_shard_is_named_before_the_first_step_and_nothing_is_written(
    tmp_path, shards, capsys, damage, words, held_out
):
    damage(shards / "train-00001.h5")
    changes = (
        {"data__files": shards / "train-00000.h5", "data__held_out_files": shards / "train-00001.h5"}
        if held_out
        else {}
    )
    assert main(arguments(tmp_path, shards, **changes)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_what_a_folder_holds_that_is_no_run_is_left_alone(tmp_path, shards, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("not ours\n")
    for resume in ("never", "auto"):
        assert main(arguments(tmp_path, shards, resume=resume)) == 2
        assert "metrics.jsonl but no run.json" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def test_a_broken_run_json_and_a_broken_checkpoint_are_named(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=2)) == 0
    moments = os.path.join(checkpoints(tmp_path)[-1], "optimizer.safetensors")
    os.remove(moments)
    assert main(arguments(tmp_path, shards, resume="auto")) == 2
    message = capsys.readouterr().err
    assert moments in message and "continue from the checkpoint before" in message
    (tmp_path / "run" / "run.json").write_text('{"model')
    assert main(arguments(tmp_path, shards, resume="auto")) == 2
    assert "run.json: cannot be read as JSON" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(tmp_path, shards, capsys):
    process = start(arguments(tmp_path, shards, training__max_steps=100000))
    wait_for(process, "step 1/")
    assert main(arguments(tmp_path, shards, training__max_steps=100000, resume="auto")) == 2
    assert "another process" in capsys.readouterr().err
    process.terminate()
    process.communicate()


def test_a_start_with_another_vocabulary_is_refused(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=1)) == 0
    vocab = os.path.join(checkpoints(tmp_path)[-1], "vocab.txt")
    with open(vocab) as file:
        text = file.read()
    with open(vocab, "w") as file:
        file.write(text.replace("word7\n", "sword\n"))
    assert (
        main(
            arguments(
                tmp_path, shards, training__output=tmp_path / "two", training__start_from=checkpoints(tmp_path)[-1]
            )
        )
        == 2
    )
    assert vocab in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_text_becomes_shards_where_there_are_none(tmp_path, shards, capsys):
    (tmp_path / "own.txt").write_text(
        "\n\n".join(f"the {i} words of a line\nand of another line here" for i in range(300))
    )
    words = arguments(
        tmp_path,
        shards,
        data__text=tmp_path / "own.txt",
        data__files=tmp_path / "own" / "train-*.h5",
        data__held_out=0.1,
        data__held_out_files=tmp_path / "own" / "held_out-*.h5",
        training__max_steps=2,
    )
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["samples"] > 0
    assert "documents   300" in capsys.readouterr().out
    assert main(words + ["--training.output", str(tmp_path / "again")]) == 0
    assert "data.text is not read" in capsys.readouterr().out


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
    process = start(arguments(tmp_path, shards, training__max_steps=100000, training__log_every=1))
    wait_for(process, "step 2/")
    (shards / "train-00001.h5").unlink()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "train-00001.h5" in errors and "Traceback" not in errors
    assert checkpoints(tmp_path)
