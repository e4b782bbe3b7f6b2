"""Processes that make parts and shards for `data.prepare`: each takes a task, a line of JSON, and answers when it is
done.

Started anew rather than forked: they take nothing of the parent's with them, neither its threads nor its memory. Each
ends at once when its parent does, in whatever way; until then it holds the staging folder's lock too, so that nobody
else writes there.
"""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Dict, Sequence

from data.errors import InputError, PrepareStopped
from data.preparing.chunks import ChunkMaker, Recipe
from data.subprocesses import ChildProcess, encode, error_message, open_channel

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
        self.settings = encode({"words": list(words), "recipe": asdict(recipe)})
        self.lock, self.closed = lock, False
        self.threads = ThreadPoolExecutor(count)
        self.own = threading.local()
        self.processes = []

    def submit(self, task: Dict) -> Future:
        """Has a task done; the future raises InputError or PrepareStopped when it could not be."""
        return self.threads.submit(self.ask, encode(task))

    def close(self) -> None:
        """Ends all processes at once, whatever they are doing."""
        self.closed = True
        for process in self.processes:
            process.kill()  # first, for the threads wait for their answers
        self.threads.shutdown()
        for process in self.processes:
            process.end()

    def ask(self, task: bytes) -> None:
        if self.closed:
            return
        process = getattr(self.own, "process", None) or self.start()
        process.send(task)
        line = process.output.readline()
        if not line.endswith(b"\n"):
            raise PrepareStopped(
                f"a process that made samples {process.how_it_ended()} (fewer --workers take less memory)"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise (InputError if answer["bad_input"] else PrepareStopped)(answer["error"])

    def start(self) -> ChildProcess:
        # One thread each: there is a process for every core.
        one_thread = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.own.process = ChildProcess("data.preparing.workers", [self.lock], one_thread)
        self.processes.append(self.own.process)
        if self.closed:
            self.own.process.kill()
        self.own.process.send(self.settings)
        return self.own.process


def main() -> None:
    tasks, reply = open_channel()
    settings = tasks.get()
    maker = ChunkMaker(settings["words"], Recipe(**settings["recipe"]))
    while True:
        answer: Dict = {}
        try:
            maker.do(tasks.get())
        except OSError as error:
            answer = {"error": f"the data set is not whole ({error})", "bad_input": False}
        except Exception as error:
            answer = error_message(error)
        reply(answer)


if __name__ == "__main__":
    main()
