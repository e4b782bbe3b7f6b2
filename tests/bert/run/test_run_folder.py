"""The run's folder, and what is left in it; and the held-out evaluation, which all processes cut alike."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from bert.config import Config
from bert.run import evaluation
from bert.run.run_folder import claim, is_begun_by, is_finished, mark_finished
from bert.signals import Stop, hold, interruptible, protected
from data.rows import Part


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.training.output = str(tmp_path)
    return config


def test_a_finished_run_still_says_which_torchruns_had_it(config):
    with claim(config, 0, 0, ["host:1:2"]):
        mark_finished(config)
    assert is_finished(config) and is_begun_by(config, ["host:1:2"]) and not is_begun_by(config, ["host:1:3"])


def test_what_killed_processes_left_half_written_goes(config, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path / "state.json.tmp-1", checkpoint / "model.safetensors.tmp-1", checkpoint / "config.json"):
        path.write_text("{}")
    with claim(config, 2, 0):
        assert [path.name for path in checkpoint.iterdir()] == ["config.json"]
        assert json.loads((tmp_path / "state.json").read_text()) == {"finished": False, "torchruns": []}
        assert not list(tmp_path.glob("*.tmp-*"))


def test_processes_evaluate_the_same_batches_whatever_their_micro_batches(config, monkeypatch):
    sizes = []
    monkeypatch.setattr(evaluation, "open_shards", lambda *arguments: [])
    monkeypatch.setattr(evaluation, "batches_in_order", lambda shards, size, part: sizes.append(size) or [])
    task = SimpleNamespace(metrics={}, panels=[])
    for rank, rows in enumerate((1, 700)):
        engine = SimpleNamespace(task=task, rank=rank, micro_batch_size=rows, steps_done=1)
        evaluation.evaluate(config, engine, Part(rank, 2))
    assert sizes == [512, 512]


def test_a_signal_that_was_held_back_ends_with_its_run():
    with interruptible(), protected():
        hold()
        os.kill(os.getpid(), signal.SIGTERM)
    with interruptible(), protected():
        pass
    with pytest.raises(Stop), interruptible(), protected():
        os.kill(os.getpid(), signal.SIGTERM)
