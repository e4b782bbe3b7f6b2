"""Processes that make parts and shards for `data.prepare`: each gets one task after another, and replies when it is
done.

Each ends as soon as its parent does, in whatever way; until then it holds the staging folder's lock too, so that nobody
else writes there.
"""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Dict, List

from data.errors import InputError, PrepareStopped
from data.preparing.chunks import ChunkMaker
from data.subprocesses import ChildProcess, encode, error_message, open_channel

__all__ = ["InlineWorker", "Workers"]

# One thread each: there is a process for every core.
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class InlineWorker:
    """Does tasks here and now: a small corpus is done before another process has started."""

    def __init__(self, settings: Dict[str, Any]):
        self.maker = ChunkMaker(**settings)

    def submit(self, task: Dict[str, Any]) -> "Future[None]":
        done: Future[None] = Future()
        try:
            self.maker.do(task)
        except OSError as error:
            raise PrepareStopped(str(error))
        done.set_result(None)
        return done

    def close(self) -> None:
        pass


class Workers:
    """Up to `count` processes, each started when there is a task for it. `lock`: a descriptor that they hold open."""

    def __init__(self, settings: Dict[str, Any], count: int, lock: int):
        self.settings, self.lock, self.closed = encode(settings), lock, False
        self.threads = ThreadPoolExecutor(count)
        self.own = threading.local()
        self.processes: List[ChildProcess] = []

    def submit(self, task: Dict[str, Any]) -> "Future[None]":
        """Has a task done; the future raises InputError or PrepareStopped when it could not be."""
        return self.threads.submit(self.run, encode(task))

    def close(self) -> None:
        """Ends all processes at once, whatever they are doing."""
        self.closed = True
        for process in self.processes:
            process.kill()  # first, for the threads wait for their replies
        self.threads.shutdown()
        for process in self.processes:
            process.end()

    def run(self, task: bytes) -> None:
        if self.closed:
            return
        process = getattr(self.own, "process", None) or self.start()
        process.send(task)
        line = process.output.readline()
        if not line.endswith(b"\n"):
            raise PrepareStopped(
                f"a process that made samples {process.how_it_ended()} (fewer --workers take less memory)"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise (InputError if reply["bad_input"] else PrepareStopped)(reply["error"])

    def start(self) -> ChildProcess:
        """This thread's process."""
        process = self.own.process = ChildProcess("data.preparing.workers", [self.lock], ONE_THREAD)
        self.processes.append(process)
        if self.closed:
            process.kill()
        process.send(self.settings)
        return process


def main() -> None:
    messages, reply = open_channel()
    maker = ChunkMaker(**messages.get())
    while True:
        try:
            maker.do(messages.get())
            reply({})
        except OSError as error:
            reply({"error": str(error), "bad_input": False})
        except Exception as error:
            reply(error_message(error))


if __name__ == "__main__":
    main()
