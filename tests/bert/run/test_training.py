"""Runs: resume, metrics, checkpoints, interrupts."""

import json
import logging
import os
import signal
import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.torch_devices import Cpu
from bert.run.checkpoint import read_safetensors, save_checkpoint
from bert.run.loop import train
from data.loading.shard_files import open_shards
from data.rows import unpacked_batch
from data.shards import read_samples
from run_pretraining import main
from tests.bert.run.runs import (
    LENGTH,
    VOCAB,
    arguments,
    assert_same_state,
    checkpoints,
    make_shards,
    read_lines,
    saved_step,
    start,
    wait_for,
    without_times,
)


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


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


def test_without_tensorboard_a_run_says_so_and_logs_the_rest(tmp_path, shards, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(arguments(tmp_path, shards, training__max_steps=2)) == 0
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1
    assert len(read_lines(tmp_path)) == 2 and not (tmp_path / "run" / "tensorboard").exists()


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


def test_text_becomes_shards_where_there_are_none(tmp_path, shards, capsys):
    (tmp_path / "own.txt").write_text(
        "\n\n".join(f"the {i} words of a line\nand of another line here" for i in range(300))
    )
    words = arguments(
        tmp_path,
        shards,
        data__text=(tmp_path / "own.txt").as_uri(),
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
