"""Data parallel: processes that torchrun starts do what one process does, stop together, and end where one is lost."""

import json
import os
import shutil
import signal

import pytest
import torch

from bert.run.checkpoint import read_safetensors
from run_pretraining import main
from tests.bert.engines.parallel.started import SMALL, STEPS, run_processes
from tests.bert.run.runs import (
    arguments,
    assert_same_state,
    checkpoints,
    make_shards,
    read_lines,
    saved_step,
    without_times,
)

STOP = 4


def assert_close_runs(folder, one, other):
    lines, other_lines = [without_times(read_lines(folder, run)) for run in (one, other)]
    assert lines == [pytest.approx(line, rel=1e-5) for line in other_lines]
    last = [os.path.join(checkpoints(folder, run)[-1], "model.safetensors") for run in (one, other)]
    weights, others = map(read_safetensors, last)
    for name, weight in weights.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
            assert (others[name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of one process and of two, and the words that start another."""
    folder = tmp_path_factory.mktemp("processes")
    shards = make_shards(folder / "shards")
    files = {"data__files": shards / "train-00000.h5", "data__held_out_files": shards / "train-00001.h5"}
    words = arguments(folder, shards, **SMALL, **files)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*words, "--training.output", str(folder / "one")]) == 0
        status, out, errors = run_processes(2, folder / "notes", [*words, "--training.output", folder / "two"])
        assert not any(status), (out, errors)
        assert out.count("2 processes") == 1 and out.count(f"step {STEPS}/{STEPS}  loss") == 1, out
        yield folder, words
    finally:
        torch.set_num_threads(threads)


def held_out(folder, run):
    return json.loads((folder / run / "held_out.json").read_text())


@pytest.mark.slow
def test_two_and_three_processes_do_what_one_does(runs):
    folder, words = runs
    status, out, errors = run_processes(3, folder / "three notes", [*words, "--training.output", folder / "three"])
    assert not any(status), (out, errors)
    for run in ("two", "three"):
        assert_close_runs(folder, "one", run)
        assert held_out(folder, run) == pytest.approx(held_out(folder, "one"), rel=1e-5)


@pytest.mark.slow
def test_processes_without_a_row_take_part(runs):
    folder, words = runs
    words = [*words, "--training.global_batch_size", "2", "--training.stop_at_step", "3"]
    assert main([*words, "--training.output", str(folder / "one of 2")]) == 0
    status, out, errors = run_processes(3, folder / "2 notes", [*words, "--training.output", folder / "three of 2"])
    assert not any(status), (out, errors)
    assert_close_runs(folder, "one of 2", "three of 2")


@pytest.mark.slow
def test_metrics_and_weights_are_the_same_in_all_processes(runs):
    folder, _ = runs
    first, second = [json.loads((folder / "notes" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert first == second and len(first["steps"]) == STEPS
    for line, metrics in zip(read_lines(folder, "two"), first["steps"]):
        assert all(line[name] == value for name, value in metrics.items())


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_at_one_step_and_the_run_goes_on_with_any_number(runs):
    folder, words = runs
    run = [*words, "--training.output", folder / "stopped"]
    status, out, errors = run_processes(2, folder / "stop", run, f"passes 1 {STOP + 1} {signal.SIGTERM.value}")
    assert any(status) and out.count(f"stopped after step {STOP} of {STEPS}") == 1, (out, errors)
    assert "interrupted" in errors, errors
    assert [saved_step(path) for path in checkpoints(folder, "stopped")] == [STOP]
    shutil.copytree(folder / "stopped", folder / "mixed")

    # With the same number, bit for bit.
    status, out, errors = run_processes(2, folder / "notes 2", [*run, "--resume", "auto"])
    assert not any(status), (out, errors)
    assert_same_state(checkpoints(folder, "stopped")[-1], checkpoints(folder, "two")[-1])
    assert without_times(read_lines(folder, "stopped")) == without_times(read_lines(folder, "two"))

    # With one, stopped in an update, where nothing is cut short; then with two again.
    mixed = [*words, "--training.output", str(folder / "mixed"), "--resume", "auto"]
    assert main([*mixed, "--training.stop_at_step", str(STOP + 1)]) == 0
    status, out, errors = run_processes(2, folder / "stop 2", mixed, f"update 1 {STOP + 2} {signal.SIGINT.value}")
    assert any(status) and out.count(f"stopped after step {STOP + 2} of {STEPS}") == 1, (out, errors)
    assert main(mixed) == 0
    assert_close_runs(folder, "one", "mixed")


@pytest.mark.slow
def test_shards_are_made_by_the_first_process_alone_and_its_error_is_said_once(tmp_path, runs):
    folder, words = runs
    text = tmp_path / "text.txt"
    text.write_text("".join(f"One word {i} and another.\nA second line {i} of it.\n\n" for i in range(300)))
    made = ["--data.files", tmp_path / "made" / "train-*.h5", "--data.held_out_files", "[]"]
    run = [*words, *made, "--data.vocab", folder / "shards" / "vocab.txt", "--training.output", tmp_path / "run"]
    status, _, errors = run_processes(2, tmp_path / "bad", [*run, "--data.text", tmp_path / "none.txt"])
    assert any(status) and errors.count("error: data.text: ") == 1, errors
    assert not (tmp_path / "run").exists()
    status, out, errors = run_processes(
        2, tmp_path / "good", [*run, "--data.text", text, "--training.stop_at_step", "2"]
    )
    assert not any(status), (out, errors)
    assert out.count("step 2/2") == 1 and len(list((tmp_path / "made").glob("train-*.h5"))) >= 1
