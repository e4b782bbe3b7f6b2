"""Processes that make parts and shards for `data.prepare`: each takes a task, a line of JSON, and answers when it is
done.

Started anew rather than forked: they take nothing of the parent's with them, neither its threads nor its memory. Each
ends at once when its parent does, in whatever way; until then it holds the staging folder's lock too, so that nobody
else writes there.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Dict, Sequence

from data.errors import InputError, PrepareStopped
from data.preparing.chunks import ChunkMaker, Recipe
from data.subprocesses import PROJECT, end_process, how_it_ended

__all__ = ["InlineWorker", "Workers"]


class InlineWorker:
    """Does tasks here and now: a small corpus is done before another process has started."""

    def __init__(self, words: Sequence[str], recipe: Recipe):
        self.maker = ChunkMaker(words, recipe)

    def submit(self, task: Dict) -> Future:
        done = Future()
        try:
            self.maker.do(task)
        except OSError as error:
            raise PrepareStopped(f"the data set is not whole ({error})")
        done.set_result(None)
        return done

    def close(self) -> None:
        pass


class Workers:
    """Up to `count` processes, each started when there is a task for it. `lock`: a descriptor that they hold open."""

    def __init__(self, words: Sequence[str], recipe: Recipe, count: int, lock: int):
        self.settings = json.dumps({"words": list(words), "recipe": asdict(recipe)}).encode() + b"\n"
        self.lock, self.closed = lock, False
        self.threads = ThreadPoolExecutor(count)
        self.own = threading.local()
        self.processes = []

    def submit(self, task: Dict) -> Future:
        """Has a task done; the future raises InputError or PrepareStopped when it could not be."""
        return self.threads.submit(self.ask, json.dumps(task, ensure_ascii=False).encode("utf-8") + b"\n")

    def close(self) -> None:
        """Ends all processes at once, whatever they are doing."""
        self.closed = True
        for process in self.processes:
            process.kill()  # first, for the threads wait for their answers
        self.threads.shutdown()
        for process in self.processes:
            end_process(process)

    def ask(self, task: bytes) -> None:
        if self.closed:
            return
        process = getattr(self.own, "process", None) or self.start()
        try:
            process.stdin.write(task)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: the missing answer says so
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise PrepareStopped(
                f"a process that made samples {how_it_ended(process)} (fewer --workers take less memory)"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise (InputError if answer["bad_input"] else PrepareStopped)(answer["error"])

    def start(self) -> subprocess.Popen:
        # One thread each: there is a process for every core.
        self.own.process = subprocess.Popen(
            [sys.executable, "-m", "data.preparing.workers"],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.lock],
            env=dict(os.environ, RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        )
        self.processes.append(self.own.process)
        if self.closed:
            self.own.process.kill()
        try:
            self.own.process.stdin.write(self.settings)
        except BrokenPipeError:
            pass
        return self.own.process


def main() -> None:
    # A signal to the whole process group is the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    lines = queue.Queue()
    threading.Thread(target=listen, args=(lines,), daemon=True).start()
    settings = json.loads(lines.get().decode("utf-8"))
    maker = ChunkMaker(settings["words"], Recipe(**settings["recipe"]))
    while True:
        task, answer = json.loads(lines.get().decode("utf-8")), {}
        try:
            maker.do(task)
        except InputError as error:
            answer = {"error": str(error), "bad_input": True}
        except OSError as error:
            answer = {"error": f"the data set is not whole ({error})", "bad_input": False}
        except Exception:
            answer = {"error": traceback.format_exc(), "bad_input": False}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def listen(lines: "queue.Queue") -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)  # the parent ended


if __name__ == "__main__":
    main()
