"""Data parallel: processes that torchrun starts do what one process does, stop together, and end where one is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from bert.engines.choosing import process_of, take_card
from bert.engines.parallel.processes import current, joined
from bert.run.checkpoint import read_safetensors
from data.errors import InputError
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

SCRIPT = os.path.join(ROOT, "tests", "bert", "engines", "parallel", "one_process.py")
STEPS, STOP = 8, 4
EXACT = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0, "parallel__timeout": 10}
SMALL = {**EXACT, "training__micro_batch_size": 2, "training__max_steps": STEPS}


def torchrun(processes, notes, words, when=""):
    """(exit status, standard output, standard error) of a run."""
    notes.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [SCRIPT, str(notes), when, *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def environment(**values):
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    others = {name: value for name, value in os.environ.items() if name not in own}
    return {**others, "OMP_NUM_THREADS": "1", **values}


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
    assert main([*words, "--training.output", str(folder / "one")]) == 0
    status, out, errors = torchrun(2, folder / "notes", [*words, "--training.output", folder / "two"])
    assert status == 0, (out, errors)
    assert out.count("2 processes") == 1 and out.count(f"step {STEPS}/{STEPS}") == 1
    yield folder, words
    torch.set_num_threads(threads)


def held_out(folder, run):
    return json.loads((folder / run / "held_out.json").read_text())


@pytest.mark.slow
def test_two_and_three_processes_do_what_one_does(runs):
    folder, words = runs
    status, out, errors = torchrun(3, folder / "three notes", [*words, "--training.output", folder / "three"])
    assert status == 0, (out, errors)
    for run in ("two", "three"):
        assert_close_runs(folder, "one", run)
        assert held_out(folder, run) == pytest.approx(held_out(folder, "one"), rel=1e-5)


@pytest.mark.slow
def test_processes_without_a_row_take_part(runs):
    folder, words = runs
    words = [*words, "--training.global_batch_size", "2", "--training.stop_at_step", "3"]
    assert main([*words, "--training.output", str(folder / "one of 2")]) == 0
    status, out, errors = torchrun(3, folder / "2 notes", [*words, "--training.output", folder / "three of 2"])
    assert status == 0, (out, errors)
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
    status, out, errors = torchrun(2, folder / "stop", run, f"passes 1 {STOP + 1} {signal.SIGTERM.value}")
    assert status != 0 and out.count(f"stopped after step {STOP} of {STEPS}") == 1, (out, errors)
    assert "interrupted" in errors, errors
    assert [saved_step(path) for path in checkpoints(folder, "stopped")] == [STOP]
    shutil.copytree(folder / "stopped", folder / "mixed")

    # With the same number, bit for bit.
    status, out, errors = torchrun(2, folder / "notes 2", [*run, "--resume", "auto"])
    assert status == 0, (out, errors)
    assert_same_state(checkpoints(folder, "stopped")[-1], checkpoints(folder, "two")[-1])
    assert without_times(read_lines(folder, "stopped")) == without_times(read_lines(folder, "two"))

    # With one, stopped in an update, where nothing is cut short; then with two again.
    mixed = [*words, "--training.output", str(folder / "mixed"), "--resume", "auto"]
    assert main([*mixed, "--training.stop_at_step", str(STOP + 1)]) == 0
    status, out, errors = torchrun(2, folder / "stop 2", mixed, f"update 1 {STOP + 2} {signal.SIGINT.value}")
    assert status != 0 and out.count(f"stopped after step {STOP + 2} of {STEPS}") == 1, (out, errors)
    assert main(mixed) == 0
    assert_close_runs(folder, "one", "mixed")


@pytest.mark.slow
def test_where_a_process_is_killed_the_first_saves_and_torchrun_ends(runs):
    folder, words = runs
    run = [*words, "--training.output", folder / "killed"]
    status, out, errors = torchrun(2, folder / "kill", run, f"update 1 {STOP} {signal.SIGKILL.value}")
    assert status != 0 and "has ended or hangs" in errors, (out, errors)
    step = saved_step(checkpoints(folder, "killed")[-1])
    assert STOP - 1 <= step <= STOP and f"To go on from step {step}" in out


@pytest.mark.slow
def test_where_a_process_hangs_the_other_names_it_within_the_timeout(runs):
    folder, words = runs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*words, "--training.output", folder / "hangs", "--parallel.timeout", "3"]
    (folder / "hang").mkdir()
    command = [sys.executable, SCRIPT, str(folder / "hang"), f"passes 1 {STOP} {signal.SIGSTOP.value}"]
    started = []
    for rank in ("0", "1"):  # without torchrun, which would wait for ever
        own = environment(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        started.append(subprocess.Popen([*command, *map(str, words)], env=own, stdout=-1, stderr=-1, text=True))
    try:
        for line in started[0].stdout:
            if line.startswith(f"step {STOP - 1}/"):
                break
        before = time.monotonic()
        _, errors = started[0].communicate(timeout=30)
        assert started[0].returncode == 1 and "process 0 of 2: process 1 has ended or hangs" in errors
        assert time.monotonic() - before < 10
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [saved_step(path) for path in checkpoints(folder, "hangs")] == [STOP - 1]


@pytest.mark.slow
def test_shards_are_made_by_the_first_process_alone_and_its_error_is_said_once(tmp_path, runs):
    folder, words = runs
    text = tmp_path / "text.txt"
    text.write_text("".join(f"One word {i} and another.\nA second line {i} of it.\n\n" for i in range(300)))
    made = ["--data.files", tmp_path / "made" / "train-*.h5", "--data.held_out_files", "[]"]
    run = [*words, *made, "--data.vocab", folder / "shards" / "vocab.txt", "--training.output", tmp_path / "run"]
    status, _, errors = torchrun(2, tmp_path / "bad", [*run, "--data.text", tmp_path / "none.txt"])
    assert status != 0 and errors.count("error: data.text: ") == 1, errors
    assert not (tmp_path / "run").exists()
    status, out, errors = torchrun(2, tmp_path / "good", [*run, "--data.text", text, "--training.stop_at_step", "2"])
    assert status == 0, (out, errors)
    assert out.count("step 2/2") == 1 and len(list((tmp_path / "made").glob("train-*.h5"))) >= 1


def test_torchrun_says_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_of("cpu") == process_of("cuda") == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_of("cpu") == process_of("cuda") == (3, 4) and process_of("ipu") == (0, 1)


def test_processes_that_do_not_find_each_other_are_an_error(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR.*torchrun"), joined("cpu", 1):
        pass
    with joined("ipu", 1):
        assert current() is None


def test_each_process_of_a_machine_has_a_card_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    take_card()
    assert taken == []
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    take_card()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="2 CUDA devices.*--nproc-per-node 2"):
        take_card()
