"""Starts the processes of a run: by torchrun, or quickly, from a server that has imported everything."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch.distributed as dist

from tests import ROOT

SCRIPT = os.path.join(ROOT, "tests", "bert", "engines", "parallel", "one_process.py")
STEPS = 8
EXACT = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0, "parallel__timeout": 20}
SMALL = {**EXACT, "training__micro_batch_size": 2, "training__max_steps": STEPS}
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["__main__", "tests.bert.engines.parallel.one_process", "bert.run.curve"])


def environment(**values):
    others = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    return {**others, "OMP_NUM_THREADS": "1", **values}


def torchrun_command(processes, notes, words, when="", options=("--standalone",)):
    notes.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(processes)]
    return [*command, SCRIPT, str(notes), when, *map(str, words)]


def torchrun(*arguments, **options):
    """(exit status, standard output, standard error) of a run."""
    command = torchrun_command(*arguments, **options)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


class Processes:
    """The processes of a run, as torchrun starts them, with a store that it keeps."""

    def __init__(self, count, notes, words, when="", own_words=(), each_a_machine=False, **variables):
        """`own_words`: more words for the last process. `each_a_machine`: torchruns of several machines start them."""
        (notes / "tmp").mkdir(parents=True, exist_ok=True)
        self.notes, self.each_a_machine, self.started = notes, each_a_machine, []
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": 1 if each_a_machine else count, "TMPDIR": notes / "tmp"}
        shared.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=self.store.port, OMP_NUM_THREADS=1)
        shared.update(TORCHELASTIC_USE_AGENT_STORE=True, **variables)
        for rank in range(count):
            own = {**shared, "RANK": rank, "LOCAL_RANK": 0 if each_a_machine else rank}
            words = [*words, *own_words] if rank == count - 1 else words
            arguments = ({name: str(value) for name, value in own.items()}, str(notes), when, [*map(str, words)])
            self.started.append(server.Process(target=be_process, args=arguments))
            self.started[-1].start()

    def texts(self, ending):
        """What each has said."""
        paths = [self.notes / f"{rank}.{ending}" for rank in range(len(self.started))]
        return [path.read_text() if path.exists() else "" for path in paths]

    def wait(self, but=()):
        """The exit statuses, and what all have said: (statuses, standard output, standard error). Waits for all `but`
        some, and sends the others of a machine SIGTERM as soon as one has failed, as torchrun does."""
        until = time.monotonic() + 90
        told = self.each_a_machine
        try:
            while any(process.is_alive() for rank, process in enumerate(self.started) if rank not in but):
                assert time.monotonic() < until, self.texts("err")
                if not told and any(process.exitcode for process in self.started):
                    told = True
                    for process in self.started:
                        process.terminate()
                time.sleep(0.02)
        finally:
            for process in self.started:
                process.kill()
                process.join()
        self.assert_nothing_is_left()
        return [process.exitcode for process in self.started], "".join(self.texts("out")), "".join(self.texts("err"))

    def assert_nothing_is_left(self):
        until = time.monotonic() + 10
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < until:
                    os.killpg(process.pid, 0)
                    time.sleep(0.02)
                pytest.fail(f"a process of {process.pid} is left")
        left = [name for name in os.listdir(self.notes / "tmp") if not name.startswith("torchinductor")]  # torch's own
        assert left == [], left


def be_process(own, notes, when, words):
    import torch

    from tests.bert.engines.parallel.one_process import run

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(own)
    if own["LOCAL_WORLD_SIZE"] == "1":  # it takes all cores of its machine, and there are others on this one
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[int(own["RANK"]) % len(cores)]])
    tempfile.tempdir = None
    torch.set_num_threads(1)
    for descriptor, ending in ((1, "out"), (2, "err")):
        file = os.open(os.path.join(notes, f"{own['RANK']}.{ending}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.exit(run(notes, when, words))


def run_processes(*arguments, **options):
    return Processes(*arguments, **options).wait()
