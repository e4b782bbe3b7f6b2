"""Processes of our own, which exchange JSON lines with their parent, and the CPUs that there are for them.

They are started anew, not forked: they take neither its threads nor its memory with them. The parent uses
`ChildProcess`, the child `open_channel`, once, and `error_message`.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

from data.errors import InputError

__all__ = ["PROJECT", "ChildProcess", "encode", "error_message", "open_channel", "usable_cpus"]

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def usable_cpus() -> int:
    """How many CPUs this process may use: on Linux those that it is kept to, elsewhere all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ChildProcess:
    """A module of this project that runs as a process and imports what this one can.

    It keeps `descriptors` open. `environment`: variables beside those of this process. `output` is what it sends: an
    encoded message a line, and an end when it has ended.
    """

    def __init__(self, module: str, descriptors: Sequence[int], environment: Mapping[str, str] = {}):
        path = os.pathsep.join(map(os.path.abspath, sys.path))  # "" in a notebook is its folder, not the child's
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid())],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout

    def send(self, line: bytes) -> None:
        """Sends an encoded message. To a process that has ended it does nothing: `output` has ended, too."""
        with contextlib.suppress(BrokenPipeError):
            self.input.write(line)
            self.input.flush()

    def how_it_ended(self) -> str:
        """Waits for its end, and says "ended with exit status 3", "was killed by SIGKILL: ..." or the like."""
        code = self.process.wait()
        if code >= 0:
            return f"ended with exit status {code}"
        reason = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{reason}"

    def kill(self) -> None:
        """Kills it, without waiting; `end` is still to be called."""
        self.process.kill()

    def end(self) -> None:
        """Kills it, and waits until it is gone."""
        self.process.kill()
        self.process.wait()
        self.output.close()
        with contextlib.suppress(BrokenPipeError):  # what was still to be sent to it
            self.input.close()


def encode(message: Any) -> bytes:
    """A JSON value as a line."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def open_channel() -> Tuple["queue.Queue", Callable[[Dict], None]]:
    """In the child: a queue of the parent's messages, and a function that sends it one, from any thread.

    The process ends as soon as its parent does. It ignores SIGINT and SIGTERM: a signal to the whole process group is
    the parent's to handle. What is printed goes to stderr, so that it cannot be taken for a message.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    messages: queue.Queue = queue.Queue()
    out, lock = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)

    def reply(message: Dict) -> None:
        with lock:
            out.write(encode(message))
            out.flush()

    for watch in (lambda: receive(messages), lambda: exit_with_parent(int(sys.argv[1]))):
        threading.Thread(target=watch, daemon=True).start()
    return messages, reply


def receive(messages: "queue.Queue") -> None:
    for line in sys.stdin.buffer:
        messages.put(json.loads(line))
    os._exit(0)


def exit_with_parent(parent: int) -> None:
    # The end of stdin says so at once, unless another process that the parent forked holds the pipe open.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def error_message(error: BaseException) -> Dict:
    """What the child replies about an exception, from within its `except` clause."""
    if isinstance(error, InputError):
        return {"error": str(error), "bad_input": True}
    return {"error": traceback.format_exc(), "bad_input": False}
