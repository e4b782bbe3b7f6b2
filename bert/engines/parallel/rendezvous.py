"""How the processes that torchrun starts find each other: a round of them, with a part of the store to itself.

torchrun starts all processes again after a fault, and as machines come and go, and may keep its store: what those of an
earlier round left there is still there, their addresses too, and torch would connect to them. Nothing that torchrun
sets says which round this is (machines that came later count restarts from 0). So each process leaves a name of its own
in the store, and the first calls a round of those that it finds, again and again until all of them answer.
"""

import contextlib
import datetime
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from typing import Callable, List, NamedTuple, TypeVar

import torch.distributed as dist

from data.errors import InputError

__all__ = ["Round", "find_round", "first_line", "own_torchrun", "within"]

T = TypeVar("T")
ADVICE = (
    "Start them with torchrun --nproc-per-node N run_pretraining.py ..., on several machines with --rdzv-endpoint "
    "HOST:PORT of one that all reach, or unset WORLD_SIZE"
)


class Round(NamedTuple):
    """The processes that torchrun started together, as one of them sees them."""

    rank: int
    size: int
    hosts: List[str]
    """The machine of each process."""
    torchruns: List[str]
    """The torchrun that started each (`own_torchrun`)."""
    store: "dist.Store"


def own_torchrun() -> str:
    """Which torchrun started this process, "" where none did: it is the same after a restart."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    started = ""
    with contextlib.suppress(OSError), open(f"/proc/{os.getppid()}/stat") as file:
        started = file.read().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{os.getppid()}:{started}"


def find_round(timeout: float) -> Round:
    """Waits for the other processes. Raises InputError where they are not all there within about `timeout` seconds."""
    until = time.monotonic() + timeout
    try:
        address, port = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
        if not serves:
            wait_for_port(address, int(port), until)
        limit = datetime.timedelta(seconds=timeout)

        def connect() -> "dist.Store":
            return dist.TCPStore(
                address, int(port), None, serves, timeout=limit, wait_for_workers=False, multi_tenant=True
            )

        store = within(timeout, connect)  # a server of something else may never answer
        return within(timeout + 5, lambda: call_round(store, rank, size, until))
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = f"{error.args[0]} is not set" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"the processes of the run do not find each other: {reason}. {ADVICE}") from error


def wait_for_port(address: str, port: int, until: float) -> None:
    """Raises OSError where nothing listens there in time. (torch's store tries for three times as long, and writes
    pages.)"""
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > until - 0.2:
                raise OSError(f"MASTER_ADDR:MASTER_PORT, {address}:{port}, does not answer ({error})")
        time.sleep(0.2)


def call_round(store: "dist.Store", rank: int, size: int, until: float) -> Round:
    """Raises TimeoutError that names the processes that did not come."""
    own = {"name": uuid.uuid4().hex, "host": socket.gethostname(), "torchrun": own_torchrun()}
    store.set(f"hello/{rank}", json.dumps(own))
    everyone, called, pause = [f"hello/{other}" for other in range(size)], "", 0.01
    while time.monotonic() < until:
        if rank == 0 and store.check(everyone):
            here = json.dumps([json.loads(store.get(hello)) for hello in everyone])
            if here != called:
                called = here
                store.set("call", here)
        if store.check(["call"]):
            call = store.get("call")
            processes = json.loads(call)
            if processes[rank : rank + 1] == [own]:
                part = dist.PrefixStore(hashlib.sha256(call).hexdigest(), store)
                part.set(f"here/{rank}", "1")
                if part.check([f"here/{other}" for other in range(size)]):
                    hosts, torchruns = ([process[key] for process in processes] for key in ("host", "torchrun"))
                    return Round(rank, size, hosts, torchruns, part)
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)
    missing = [str(other) for other in range(size) if not store.check([everyone[other]])]
    raise TimeoutError(f"of {size} processes, these did not come: {', '.join(missing) or 'some of earlier rounds'}")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """ask(), which may wait for another machine. Raises RuntimeError where it takes longer: torch's store waits for
    ever on a link that was cut."""
    answers: List[T] = []
    errors: List[Exception] = []

    def answer() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    with contextlib.suppress(IndexError):
        raise errors[0]
    if not answers:
        raise RuntimeError(f"no answer within {seconds:.0f} seconds")
    return answers[0]


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
