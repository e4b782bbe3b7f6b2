"""Evaluation while training: it changes nothing, is cut back with the metrics, and marks the best checkpoint."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from bert.run import data_set
from bert.run.metrics_log import MetricsLog
from bert.tasks.pretraining import Pretraining
from run_pretraining import main
from tests.bert.run.runs import arguments, assert_same_state, checkpoints, make_shards, read_lines, without_times


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def held_out(shards, **options):
    files = {"data__files": shards / "train-00000.h5", "data__held_out_files": shards / "train-00001.h5"}
    return {**files, "training__max_steps": 6, "training__evaluate_every": 2, **options}


def evaluations(tmp_path, run="run"):
    return [json.loads(line) for line in (tmp_path / run / "held_out.jsonl").read_text().splitlines()]


def steps(tmp_path, run="run"):
    return [int(os.path.basename(path)[len("step_") :]) for path in checkpoints(tmp_path, run)]


def test_it_changes_no_bit_of_the_run_and_its_last_line_is_the_runs_result(tmp_path, shards, capsys):
    options = held_out(shards, training__precision="bfloat16")
    assert main(arguments(tmp_path, shards, **options)) == 0
    said = capsys.readouterr().out
    assert said.count("/6  held out (33 samples): loss ") == said.count("  best\n") == 3
    del options["training__evaluate_every"]
    assert main(arguments(tmp_path, shards, **options, training__output=tmp_path / "other")) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "other")[-1])
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(tmp_path, "other"))
    assert [line["step"] for line in evaluations(tmp_path)] == [2, 4, 6]
    assert evaluations(tmp_path)[-1:] == evaluations(tmp_path, "other")
    assert json.loads((tmp_path / "run" / "held_out.json").read_text()) == evaluations(tmp_path)[-1]


def test_a_resumed_run_has_the_evaluations_of_the_uninterrupted_one_each_once(tmp_path, shards):
    options = held_out(shards, training__evaluate_every=3, training__max_steps=7)
    assert main(arguments(tmp_path, shards, **options)) == 0
    other = {**options, "training__output": tmp_path / "other"}
    # Saved before step 3 is evaluated, as by a kill in between; a line of a later step is there, too.
    assert main(arguments(tmp_path, shards, **other, training__stop_at_step=3)) == 0
    state = tmp_path / "other" / "checkpoints" / "step_00000003" / "training_state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps({**values, "evaluated": 0, "best": {}}))
    (tmp_path / "other" / "held_out.jsonl").write_text('{"step": 5, "loss": 1}\n{"step"')
    assert main(arguments(tmp_path, shards, **other, resume="auto")) == 0
    assert evaluations(tmp_path, "other") == evaluations(tmp_path)
    assert [line["step"] for line in evaluations(tmp_path)] == [3, 6, 7]


def test_a_run_that_is_extended_keeps_the_evaluation_of_its_last_step_and_what_was_best(tmp_path, shards, monkeypatch):
    losses = iter([2.0, 3.0])
    evaluate = data_set.evaluate
    monkeypatch.setattr(data_set, "evaluate", lambda *values: {**evaluate(*values), "loss": next(losses)})
    options = held_out(shards, training__keep_checkpoints=1)
    del options["training__evaluate_every"]
    assert main(arguments(tmp_path, shards, **options)) == 0
    assert main(arguments(tmp_path, shards, **{**options, "training__max_steps": 8}, resume="auto")) == 0
    assert [line["step"] for line in evaluations(tmp_path)] == [6, 8]
    assert steps(tmp_path) == [6, 8]
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "step_00000006"


@pytest.mark.parametrize("save_every", [100, 2])
def test_the_best_checkpoint_stays_beside_the_newest_and_is_named(tmp_path, shards, monkeypatch, save_every):
    losses = iter([4.0, 2.0, float("nan"), 3.0, 2.5, 9.0])
    evaluate = data_set.evaluate
    monkeypatch.setattr(data_set, "evaluate", lambda *values: {**evaluate(*values), "loss": next(losses)})
    options = held_out(shards, training__max_steps=12, training__keep_checkpoints=1, training__save_every=save_every)
    assert main(arguments(tmp_path, shards, **options, training__stop_at_step=7)) == 0
    assert steps(tmp_path) == [4, 7]
    assert main(arguments(tmp_path, shards, **options, resume="auto")) == 0
    assert steps(tmp_path) == [4, 12]
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert (best["checkpoint"], best["step"], best["loss"]) == ("step_00000004", 4, 2.0)


def test_an_evaluation_that_is_interrupted_is_made_when_the_run_goes_on(tmp_path, shards, monkeypatch):
    def interrupt(*values):
        raise KeyboardInterrupt

    assert main(arguments(tmp_path, shards, **held_out(shards))) == 0
    other = held_out(shards, training__output=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(data_set, "evaluate", interrupt)
        assert main(arguments(tmp_path, shards, **other)) == 130
    assert steps(tmp_path, "other") == [2]
    assert main(arguments(tmp_path, shards, **other, resume="auto")) == 0
    assert evaluations(tmp_path, "other") == evaluations(tmp_path)


def test_without_matplotlib_a_run_ends_well_and_says_what_to_install(tmp_path, shards, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(tmp_path, shards, training__max_steps=2)) == 0
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    assert not (tmp_path / "run" / "curve.png").exists()


@pytest.mark.parametrize("step, skipped, loss", [(20, 0, 9.464), (10500, 0, 10.541), (10500, 999, 10.541)])
def test_a_line_has_at_most_100_characters_however_large_the_run(tmp_path, caplog, step, skipped, loss):
    engine = SimpleNamespace(task=Pretraining(), rank=1, steps_done=0, made_up=False)
    losses = {"mlm_loss": loss, "nsp_loss": 0.693, "mlm_accuracy": 0.145, "nsp_accuracy": 0.523, "loss": loss + 0.693}
    rates = {"sequences_per_second": 123456.78, "data_wait_fraction": 0.123, "learning_rate": 0.006}
    with caplog.at_level("INFO", "bert"), MetricsLog(str(tmp_path), engine, step) as log:
        log.show({"step": step, "skipped_updates": skipped, **losses, **rates}, 400000.0)
    (line,) = caplog.messages
    assert len(line) <= 100 and line.startswith(f"step {step}/{step}  ") and line.endswith("4 days 16 h left")
    assert f"mlm {loss:.3f} (14.5%)  nsp 0.693 (52.3%)" in line and "123457 seq/s" in line
