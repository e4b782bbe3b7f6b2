"""A process that is killed, hangs, fails or differs: the others end in time and name it, and the run can go on."""

import os
import re
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from bert.config import Config
from bert.engines.choosing import check_processes, process_of, take_card
from bert.engines.parallel import processes
from bert.engines.parallel.processes import current, joined
from bert.engines.parallel.rendezvous import Round, call_round, within
from bert.errors import ProcessLost
from bert.signals import Stop
from data.errors import InputError
from run_pretraining import main
from tests.bert.engines.parallel.started import SMALL, STEPS, Processes, run_processes, torchrun
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
SAVES = ["--training.save_every", "2"]
KILL = signal.SIGKILL.value


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return arguments(folder, make_shards(folder / "shards"), **SMALL)


@pytest.fixture
def run(words, tmp_path):
    return [*words, "--training.output", tmp_path / "run"]


@pytest.mark.slow
@pytest.mark.parametrize("place, rank, saved", [("passes", 1, 3), ("reduction", 2, 3), ("save", 0, 2)])
def test_where_a_process_is_killed_the_others_name_it_and_the_first_saves(run, tmp_path, place, rank, saved):
    smaller = ["--training.micro_batch_size", "3", "--data.workers", "1"]  # these may differ
    when = f"{place} {rank} {STOP} {KILL}"
    status, out, errors = run_processes(3, tmp_path / "notes", [*run, *SAVES], when, own_words=smaller)
    assert status == [-KILL if process == rank else 1 for process in range(3)], errors
    assert errors.count("error: ") == 1
    assert re.search(rf"error: process \d of 3: .*\bprocess {rank} has ended or hangs", errors)
    assert "--resume auto" in errors and "Traceback" not in errors
    assert [saved_step(path) for path in checkpoints(tmp_path)][-1] == saved
    assert out.count(f"To go on from step {saved}") == (rank > 0)


@pytest.mark.slow
def test_where_a_process_fails_those_of_other_machines_say_why(run, tmp_path):
    when = f"batch 1 {STOP} fail"
    status, out, errors = run_processes(3, tmp_path / "notes", run, when, each_a_machine=True)
    bad = "train-00007.h5: sample 3 is bad"
    assert status == [1, 2, 1] and errors.count("error: ") == 3
    assert f"error: process 1 of 3: {bad}\n" in errors
    for rank in (0, 2):
        assert f"error: process {rank} of 3: process 1 has failed: {bad}. Start again" in errors
    assert saved_step(checkpoints(tmp_path)[-1]) == STOP and f"stopped after step {STOP} of {STEPS}" in out


@pytest.mark.slow
def test_what_a_loader_says_to_all_processes_of_its_machine_is_said_once(run, tmp_path):
    status, out, errors = run_processes(3, tmp_path / "notes", run, f"batch all {STOP} fail")
    assert all(status) and errors.count("error: ") == 1 and errors.count("sample 3 is bad") == 1
    assert saved_step(checkpoints(tmp_path)[-1]) == STOP and f"stopped after step {STOP} of {STEPS}" in out


@pytest.mark.slow
def test_where_a_process_hangs_the_others_name_it_within_the_timeout(run, tmp_path):
    limited = [*run, "--parallel.timeout", "6"]
    when = f"passes 1 {STOP} {signal.SIGSTOP.value}"
    started = Processes(3, tmp_path / "notes", limited, when, each_a_machine=True)
    status, _, errors = started.wait(but=[1])
    assert (status[0], status[2]) == (1, 1)
    for rank in (0, 2):
        assert re.search(rf"error: process {rank} of 3: .*\bprocess 1 has ended or hangs", errors)
    assert [saved_step(path) for path in checkpoints(tmp_path)] == [STOP - 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "when, found",
    [
        (f"batch 2 {STOP} skip", 'process 2: the shards left out is ["train-00007.h5"], expected [] as in process 0'),
        (f"update 2 {STOP} drift", f"process 2: the sum of the weights' bits after step {STOP} is "),
    ],
)
def test_where_a_process_has_another_batch_or_weights_all_stop(run, tmp_path, when, found):
    status, _, errors = run_processes(3, tmp_path / "notes", [*run, *SAVES], when)
    assert status == [1, 1, 1] and errors.count("error: ") == 1 and f"error: {found}" in errors
    assert saved_step(checkpoints(tmp_path)[-1]) == (2 if "drift" in when else STOP)


@pytest.mark.slow
@pytest.mark.parametrize(
    "when, own_words, found",
    [
        (
            "settings 2 0 differ",
            ["--training.seed", "43"],
            " as in process 0 (and training.seed)",
        ),
        ("data 0 0 lose", [], "process 0: samples of train-00000.h5 is missing, expected 67 as in process 1"),
        ("", ["--data.files", "none.h5", "--parallel.pipeline", "2"], "data.files is "),
    ],
)
def test_processes_that_differ_are_found_before_the_first_step(run, tmp_path, when, own_words, found):
    status, out, errors = run_processes(3, tmp_path / "notes", run, when, own_words=own_words)
    assert status == [2, 2, 2] and errors.count("error: ") == 1 and found in errors, errors
    assert "step" not in out and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, variables, found",
    [
        (["--parallel.timeout", "1"], {"MASTER_PORT": 1}, "127.0.0.1:1, does not answer"),
        (["--parallel.timeout", "1"], {"WORLD_SIZE": 4}, "of 4 processes, these did not come: 3"),
        (["--training.seed", "x"], {}, "training.seed is x"),
    ],
)
def test_bad_input_is_said_once(run, tmp_path, more, variables, found):
    status, _, errors = run_processes(3, tmp_path / "notes", [*run, *more], **variables)
    assert status[0] == 2 and all(status) and errors.count("error: ") == 1 and found in errors, errors


def test_a_pipeline_needs_processes(words, capsys, monkeypatch):
    assert main([*words, "--parallel.pipeline", "2"]) == 2
    assert "there is one process: expected a multiple of 2. Start as many: torchrun --nproc-per-node 2" in (
        capsys.readouterr().err
    )
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    config = Config()
    config.parallel.pipeline = 2
    with pytest.raises(InputError, match="parallel.pipeline is 2, but torchrun started 3: expected a multiple of 2"):
        check_processes(config, "cpu")


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on_by_itself(run, words, tmp_path):
    options = ["--standalone", "--max-restarts", "1"]
    when = f"save 0 {STOP} {KILL}"
    status, out, errors = torchrun(2, tmp_path / "notes", [*run, *SAVES], when, options=options)
    assert status == 0 and f"continues from {tmp_path}/run/checkpoints/step_00000002" in out, (out, errors)
    undisturbed = [*words, *SAVES, "--training.output", tmp_path / "undisturbed"]
    status, _, errors = run_processes(2, tmp_path / "notes 2", undisturbed)
    assert status == [0, 0], errors
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "undisturbed")[-1])
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(tmp_path, "undisturbed"))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step_{step:08}" for step in (4, 6, 8)]
    # Another torchrun does not go on with it unasked.
    status, _, errors = run_processes(2, tmp_path / "notes 3", undisturbed, TORCHELASTIC_RUN_ID="none")
    assert status == [2, 2] and errors.count("holds a run already") == 1


def test_each_round_has_a_part_of_the_store_of_its_own_whatever_earlier_ones_left():
    store, parts = dist.HashStore(), []
    for _ in range(3):
        rounds = {}

        def call(rank, rounds=rounds):
            rounds[rank] = call_round(store, rank, 2, time.monotonic() + 10)

        threads = [threading.Thread(target=call, args=[rank]) for rank in (1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert rounds[0].hosts == rounds[1].hosts and (rounds[0].rank, rounds[1].rank) == (0, 1)
        rounds[0].store.set("key", str(len(parts)))
        assert rounds[1].store.get("key") == str(len(parts)).encode()
        parts.append(rounds[0].store)
    assert [part.get("key") for part in parts] == [b"0", b"1", b"2"]
    with pytest.raises(TimeoutError, match="of 2 processes, these did not come: 1"):
        call_round(dist.HashStore(), 0, 2, time.monotonic() + 0.1)


def test_what_does_not_answer_is_left_waiting():
    assert within(1, lambda: 3) == 3
    with pytest.raises(ValueError, match="bad"):
        within(1, lambda: int("bad"))
    with pytest.raises(RuntimeError, match="no answer"):
        within(0.1, lambda: time.sleep(0.5))


def processes_of(store, size=2, timeout=1.0):
    """As each sees them, without connections."""
    rounds = [Round(rank, size, ["host"] * size, [""] * size, store) for rank in range(size)]
    return [processes.Processes(found, timeout, uses_gloo_alone=False) for found in rounds]


def test_others_wait_for_the_first_as_long_as_it_works_and_no_longer():
    first, second = processes_of(dist.HashStore())
    got = []
    waiting = threading.Thread(target=lambda: got.append(second.wait_for("made")))
    with first.working():
        waiting.start()
        waiting.join(1.5)
        assert waiting.is_alive() and not got
        first.set("made", "all")
        waiting.join(10)
    assert got == ["all"]
    with pytest.raises(ProcessLost, match="process 0 has ended or hangs") as lost:
        second.wait_for("never")
    assert list(lost.value.ranks) == [0]


def test_a_signal_that_not_all_know_of_is_a_reason_for_the_others():
    first, second, third = processes_of(dist.HashStore(), 3)
    first.set(processes.FIRST_LEAVES)
    second.stops_together = True
    for process in (second, third):
        process.leave(Stop(signal.SIGTERM))
    assert first.who_is_silent() == {0: "", 1: "", 2: "stopped by SIGTERM"}


def test_ending_connections_leaves_other_files_alone(monkeypatch):
    process = processes_of(dist.HashStore())[0]
    process.uses_gloo_alone = True
    monkeypatch.setenv("MASTER_PORT", "1")
    listener = socket.create_server(("127.0.0.1", 0))
    pipe, one = os.pipe(), socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    files = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lambda path: [*map(str, pipe), str(one.fileno())])
        process.disconnect()
    assert set(os.listdir("/proc/self/fd")) == files and other.recv(1) == b""
    os.write(pipe[1], b"x")
    assert os.read(pipe[0], 1) == b"x"
    for descriptor in pipe:
        os.close(descriptor)
    for connection in (one, other, listener):
        connection.close()


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
    with pytest.raises(InputError, match="MASTER_ADDR is not set.*torchrun"), joined("cpu", 1):
        pass
    with joined("ipu", 1):
        assert current() is None


def test_each_process_of_a_machine_has_a_card_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    take_card()
    assert taken == []
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    take_card()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # all of them say so, not only the third
    with pytest.raises(InputError, match="3 processes on a machine with 2 CUDA devices.*--nproc-per-node 2"):
        take_card()
