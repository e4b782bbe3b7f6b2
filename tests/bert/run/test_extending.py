"""Runs that go on with another number of steps, branches of runs, and what run.json says of them."""

import json
import os
import shutil

import pytest

from bert.run.provenance import git
from run_pretraining import main
from tests import ROOT
from tests.bert.run.runs import (
    arguments,
    assert_same_state,
    checkpoints,
    make_shards,
    read_lines,
    saved_step,
    without_times,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with shards and a run of 4 steps that is done, with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("extending")
    make_shards(folder / "shards")
    assert main(words(folder)) == 0
    return folder


def words(folder, **changes):
    return arguments(folder, folder / "shards", **{"training__max_steps": 4, "training__save_every": 2, **changes})


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "shards", tmp_path / "shards")
    return tmp_path


def settings(folder, run="run"):
    return json.loads((folder / run / "run.json").read_text())


def test_a_finished_run_goes_on_with_more_steps_and_says_what_that_does_to_its_schedule(folder, capsys):
    assert main(words(folder, training__max_steps=6, resume="auto")) == 0
    said = capsys.readouterr().out
    assert "max_steps was 4 and is 6 now: the learning rate was 0.0025 at step 4 and rises to 0.004 at step 5" in said
    assert [line["step"] for line in read_lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert read_lines(folder)[4]["learning_rate"] == pytest.approx(0.004)
    assert saved_step(checkpoints(folder)[-1]) == 6
    assert settings(folder)["training.max_steps"] == 6
    sessions = settings(folder)["sessions"]
    assert [(s["after_step"], s["config"]["training"]["max_steps"]) for s in sessions] == [(0, 4), (4, 6)]
    assert main(words(folder, training__max_steps=5, resume="auto")) == 2  # fewer than are done
    assert "training.max_steps is 5" in capsys.readouterr().err and len(settings(folder)["sessions"]) == 2
    assert main(words(folder, training__max_steps=6, resume="auto")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_it_says_what_was_done_of_a_decay_and_where_to_branch_from(tmp_path, capsys):
    make_shards(tmp_path / "shards")
    wsd = {"optimizer__schedule": "wsd", "optimizer__decay_ratio": 0.5}
    assert main(words(tmp_path, **wsd, training__stop_at_step=3)) == 0
    capsys.readouterr()
    assert main(words(tmp_path, **wsd, training__max_steps=8, training__stop_at_step=4, resume="auto")) == 0
    said = capsys.readouterr().out
    assert "0.00667 at step 3 and rises to 0.01 at step 4. The decay had begun" in said and "branch_from" in said
    # Fewer steps than before, but not fewer than are done: the run ends sooner.
    assert main(words(tmp_path, **wsd, training__max_steps=4, resume="auto")) == 0
    assert "was 8 and is 4 now: no step is left to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"]


def test_a_branch_without_a_change_is_the_run_bit_for_bit_and_one_with_a_change_is_not(folder, capsys):
    run, output = folder / "run", {"training__output": folder / "branch"}
    assert main(words(folder, **output, training__branch_from=f"{run}@2", training__stop_at_step=3)) == 0
    assert main(words(folder, **output, training__branch_from=f"{run}@2", resume="auto")) == 0
    assert "branches from" in capsys.readouterr().out
    assert_same_state(checkpoints(folder)[-1], checkpoints(folder, "branch")[-1])
    assert without_times(read_lines(folder, "branch")) == without_times(read_lines(folder))[2:]
    other = {"training__output": folder / "other", "training__branch_from": checkpoints(folder)[0]}
    assert main(words(folder, **other, optimizer__learning_rate=0.02)) == 0
    assert "with optimizer.learning_rate 0.02 (was 0.01)\n" in capsys.readouterr().out
    lines = read_lines(folder, "other")
    assert lines[0]["loss"] == read_lines(folder)[2]["loss"] and lines[1]["loss"] != read_lines(folder)[3]["loss"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training__branch_from": "{run}@3"}, "no checkpoint of step 3, expected one of those that are there: 2, 4"),
        ({"training__branch_from": "{run}"}, "expected RUN@STEP"),
        ({"training__branch_from": "gone@3"}, "there is none in gone/checkpoints"),
        ({"optimizer__name": "adamw"}, 'optimizer.name is "lamb" there, expected "adamw"'),
        ({"model__num_hidden_layers": 1}, "model.num_hidden_layers is 2 there, expected 1"),
        (
            {"model__num_hidden_layers": 1, "optimizer__name": "muon"},
            "add --model.num_hidden_layers 2 --optimizer.name lamb",
        ),
        ({"training__max_steps": 2}, "expected more than 2"),
        ({"training__start_from": "{run}/checkpoints/step_00000004"}, "training.start_from is"),
        ({"training__output": "{run}"}, "holds a run already"),
    ],
)
def test_what_cannot_be_branched_from_is_said_and_nothing_is_written(finished, tmp_path, capsys, changes, message):
    values = {"training__branch_from": "{run}@2", "training__output": tmp_path / "branch", **changes}
    options = {key: str(value).format(run=finished / "run") for key, value in values.items()}
    assert main(words(finished, **options)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "branch").exists()


def test_run_json_says_what_the_run_was_made_of_and_older_ones_are_resumed(folder):
    (session,) = settings(folder)["sessions"]
    assert session["versions"].keys() == {"project", "python", "torch", "numpy"}
    assert session["device"].startswith("cpu (") and session["processor"] and session["command"].startswith("python ")
    assert len(session["data_sha256"]) == len(session["source_sha256"] + "0" * 52) == 64
    if os.path.exists(os.path.join(ROOT, ".git")) and shutil.which("git"):
        assert len(session["commit"]) == 40 and session["dirty"] in (True, False)
    old = {key: value for key, value in settings(folder).items() if key not in ("sessions", "training.branch_from")}
    (folder / "run" / "run.json").write_text(json.dumps(old))
    assert main(words(folder, training__max_steps=5, resume="auto")) == 0
    assert [session["after_step"] for session in settings(folder)["sessions"]] == [4]


def test_a_folder_that_is_no_checkout_and_a_machine_without_git_have_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("bert.run.provenance.PROJECT", str(tmp_path))
    assert git("rev-parse", "HEAD") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git("rev-parse", "HEAD") is None
