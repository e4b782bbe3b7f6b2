"""The processes that torchrun starts, as one group of torch.distributed: what they agree on, and how they end.

The weights of a batch sum to 1 over the global batch (data/rows.py), so gradients and metrics are sums over the
processes, without a division.
"""

import collections
import contextlib
import datetime
import json
import os
import re
import socket
import stat
import threading
import time
import zlib
from typing import Any, Callable, Collection, Dict, Iterator, List, Mapping, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist

from bert.engines.choosing import process_of
from bert.engines.parallel.rendezvous import Round, find_round, first_line, own_torchrun, within
from bert.errors import Diverged, ProcessesDiffer, ProcessLost, said_once_a_machine
from bert.signals import Stop, cancellable, leave_quietly, protected
from data.errors import InputError, LoaderDied

__all__ = ["Processes", "current", "failing_together", "first_alone", "joined", "torchruns"]

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# Keys of the store.
FIRST_WORKS, FIRST_IS_DONE, FIRST_LEAVES = "first works", "first is done", "first leaves"
NOTICED, REASON, SPEAKS = "noticed by", "reason of", "one speaks of"
LOST_CONNECTION = re.compile("gloo|nccl|connection|timed? ?out|socket|broken pipe", re.IGNORECASE)
ANSWER = 3.0  # seconds that the store may take to answer when another process is lost
GRACE = 2.0  # seconds that processes may take to come where this one found that another is lost

_current: Optional["Processes"] = None


def current() -> Optional["Processes"]:
    """The processes that this one has `joined`; None where it runs alone."""
    return _current


def torchruns() -> List[str]:
    """Those that started the processes of the run; none where they were started otherwise."""
    return sorted({*(_current.torchruns if _current else [own_torchrun()])} - {""})


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[None]:
    """While open, this process and the others that torchrun started are one group, which waits `timeout` seconds for
    each of them; no group for a process alone, or on IPUs.

    An error that ends it reaches the others with its reason, and is said once a machine: the others of the machine
    leave without a word (SystemExit), after the first has saved. Raises InputError where they do not find each other.
    """
    global _current
    if device not in BACKENDS or process_of(device)[1] == 1:
        yield
        return
    with said_once_a_machine():
        found = find_round(timeout)
        form_group(BACKENDS[device], found, timeout)
    _current = Processes(found, timeout, uses_gloo_alone=BACKENDS[device] == "gloo")
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        with protected():  # torchrun sends SIGTERM as soon as one of a machine has ended
            error = _current.explain(error)
            _current.leave(error)
        raise error
    finally:
        _current = None
    dist.destroy_process_group()


def form_group(backend: str, found: Round, timeout: float) -> None:
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, store=found.store, rank=found.rank, world_size=found.size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of the run found each other, but cannot connect: {first_line(error)}. GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME name the network interface, such as eth0, by which machines reach each other"
        ) from error


class Processes:
    """The processes of a run, as the one with this `rank` sees them. What its methods do, all do at the same place.

    They raise ProcessLost where another process has ended or does not come, ProcessesDiffer where processes have other
    batches than others.
    """

    def __init__(self, found: Round, timeout: float, uses_gloo_alone: bool):
        self.rank, self.size, self.hosts, self.torchruns, self.store = found
        self.timeout, self.uses_gloo_alone = timeout, uses_gloo_alone
        self.meetings = 0
        self.over = False  # it has ended with an error that all know of
        self.stops_together = self.told = False
        self.batch: Dict[str, Any] = {}

    def name(self, rank: int) -> str:
        return f"process {rank} on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else f"process {rank}"

    def agree(self, values: Sequence[int]) -> List[int]:
        """The largest of each value over all processes; the host waits for it, the device does not."""
        self.meetings += 1
        check = checksum(self.batch)
        with self.naming_who_is_lost():
            largest = torch.tensor([check, -check, *values])
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        highest, lowest, *agreed = largest.tolist()
        if highest != -lowest:
            advice = "All must have the same shards, whole; start again with --resume auto"
            raise ProcessesDiffer(f"{self.find_difference(self.batch)}. {advice}")
        return agreed

    def note_batch(self, batch: Dict[str, Any]) -> None:
        """Has all processes find out, as they next agree, whether they have alike what this says of their batch."""
        self.batch = batch

    def check_same(self, facts: Dict[str, Any], advice: str) -> None:
        """Raises ProcessesDiffer in all processes, with `advice`, where one has other `facts` (JSON) than most."""
        check = checksum(facts)
        highest, lowest = self.agree([check, -check])
        if highest != -lowest:
            raise ProcessesDiffer(f"{self.find_difference(facts)}. {advice}")

    def find_difference(self, facts: Dict[str, Any]) -> str:
        """Which process differs from most, or from the first, and in what."""
        with self.naming_who_is_lost():
            return within(self.timeout + ANSWER, lambda: self.compare(facts))  # the store waits for `timeout` itself

    def compare(self, facts: Dict[str, Any]) -> str:
        mine, difference = f"facts {self.meetings} ", f"difference {self.meetings}"
        self.store.set(f"{mine}{self.rank}", json.dumps(facts, sort_keys=True))
        if self.rank == 0:
            said = [self.store.get(f"{mine}{rank}").decode() for rank in range(self.size)]
            ((usual, _),) = collections.Counter(said).most_common(1)
            odd = next(rank for rank in range(self.size) if said[rank] != usual)
            found, expected = json.loads(said[odd]), json.loads(usual)
            keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
            key = keys[0]
            is_there, should = (json.dumps(x[key]) if key in x else "missing" for x in (found, expected))
            words = f"{key} is {is_there}, expected {should}"
            more = f" (and {', '.join(keys[1:4])})" if keys[1:] else ""
            like = self.name(said.index(usual))
            self.store.set(difference, f"{self.name(odd)}: {words} as in {like}{more}")
        return self.store.get(difference).decode()

    def meet(self, number: int = 0, stopped: int = 0) -> int:
        """Meets all processes, and returns the largest `number`. Raises Stop in all where one was told to stop, by a
        signal of the number `stopped` or by one that has come since."""
        try:
            with cancellable():
                pass
        except Stop as stop:
            stopped = stop.signal_number
        stopped, number = self.agree([stopped, number])
        if stopped:
            self.stops_together = True
            raise Stop(stopped)
        return number

    def sum_metrics(
        self, metrics: Mapping[str, torch.Tensor], names: Sequence[str], device: str
    ) -> Dict[str, torch.Tensor]:
        """The metrics of these names over all processes; a process without rows has none of its own."""
        values = torch.zeros(len(names), device=device)
        if metrics:
            values = torch.stack([metrics[name].float() for name in names])
        with self.naming_who_is_lost():
            dist.all_reduce(values)
        return dict(zip(names, values.unbind()))

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """float32 values, added up over all processes."""
        total = torch.from_numpy(values)
        if not self.uses_gloo_alone:
            total = total.cuda()
        with self.naming_who_is_lost():
            dist.all_reduce(total)
        return total.cpu().numpy()

    @contextlib.contextmanager
    def naming_who_is_lost(self, computing: bool = False) -> Iterator[None]:
        """Turns an error of a connection into ProcessLost. While `computing`, other errors stay what they are."""
        try:
            yield
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # torch.distributed.pipelining raises errors of its own from them
                cause = cause.__cause__
            if computing and not (isinstance(cause, RuntimeError) and LOST_CONNECTION.search(str(cause))):
                raise cause
            raise self.lost(error) from error

    def lost(self, error: Exception, grace: float = GRACE) -> ProcessLost:
        """What an error comes from."""
        lost = self.find_lost(grace)
        words = [
            f"{self.name(rank)} has failed: {why}" if why else f"{self.name(rank)} has ended or hangs"
            for rank, why in lost.items()
        ]
        named = "; ".join(words) or "the connection to another process is lost"
        said = re.sub(r"^\[\S+\] |\. This is typically.*", "", first_line(error))  # where in torch's source, and advice
        torch_says = "" if any(lost.values()) else f" ({said})"
        message = f"process {self.rank} of {self.size}: {named}{torch_says}. Start again with --resume auto"
        return ProcessLost(message, lost)

    def find_lost(self, grace: float) -> Dict[int, str]:
        """Who is lost, and why where it could still say so: those that do not notice that something is wrong."""
        until = time.monotonic() + grace
        try:
            within(ANSWER, lambda: self.store.set(f"{NOTICED} {self.rank}", "1"))
            self.disconnect()
            while True:
                lost = within(ANSWER, self.who_is_silent)
                failed = {rank: why for rank, why in lost.items() if why}
                if failed or not lost or time.monotonic() > until:
                    return failed or lost
                time.sleep(0.05)
        except RuntimeError:  # the store is on the machine of the first process
            self.disconnect()
            return {0: ""} if self.rank else {}

    def who_is_silent(self) -> Dict[int, str]:
        """Other processes that have not noticed, and why they have failed where they said so."""
        silent = {}
        for rank in range(self.size):
            if self.store.check([f"{REASON} {rank}"]):
                silent[rank] = self.store.get(f"{REASON} {rank}").decode()
            elif not self.store.check([f"{NOTICED} {rank}"]):
                silent[rank] = ""
        return silent

    def disconnect(self) -> None:
        """Has those who wait for this process find out at once, where all connections are gloo's. Destroying the group
        does not, as long as anything refers to work of it."""
        if self.uses_gloo_alone and os.path.exists("/dev/fd"):
            for descriptor in map(int, os.listdir("/dev/fd")):
                with contextlib.suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                        shut_down(socket.socket(fileno=descriptor))

    def explain(self, error: BaseException) -> BaseException:
        """The error that an error comes from: processes of a machine share the loader of the first of them."""
        if isinstance(error, LoaderDied) and local_rank():
            found = self.lost(error, grace=5 * GRACE)
            return found if found.ranks else error
        return error

    def tell(self, error: BaseException) -> None:
        """Lets the others find out why this process fails. Raises RuntimeError where the store does not answer."""
        if not self.told:
            reason = first_line(error) or repr(error)
            within(ANSWER, lambda: self.store.set(f"{REASON} {self.rank}", reason))
            self.told = True

    def tell_before_saving(self, error: BaseException, disconnects: bool) -> None:
        """`tell`, where it is sure that the error is this process's own (see `explain`); `disconnects` has the others
        find out at once, where no save needs the connections."""
        if not isinstance(error, ProcessLost) and not (isinstance(error, LoaderDied) and local_rank()):
            with contextlib.suppress(RuntimeError):
                self.tell(error)
                if disconnects:
                    self.disconnect()

    def leave(self, error: BaseException) -> None:
        """Ends this process's part, with an error: tells the others why, waits until the first has saved, and returns
        where this is the process of its machine that says it; else raises SystemExit."""
        if self.over:
            return
        lost = error.ranks if isinstance(error, ProcessLost) else ()
        by_all = isinstance(error, (Diverged, ProcessesDiffer)) or (isinstance(error, Stop) and self.stops_together)
        speaks = self.speaks(lost)
        with contextlib.suppress(RuntimeError):
            if not by_all and not isinstance(error, ProcessLost):
                self.tell(error)
                self.disconnect()
                name_process(error, self)
            if self.rank == 0:
                within(ANSWER, lambda: self.store.set(FIRST_LEAVES, "1"))
            elif 0 not in lost and (by_all or self.uses_gloo_alone):  # else it may not know before this process ends
                self.wait_for(FIRST_LEAVES)
        if not speaks:
            leave_quietly(exit_status(error))

    def speaks(self, lost: Collection[int]) -> bool:
        """Whether this process is the first of its machine to ask this; where the store is gone, the first of those
        that are left."""
        first = self.rank - local_rank()
        try:
            return within(ANSWER, lambda: self.store.add(f"{SPEAKS} {first}", 1)) == 1
        except RuntimeError:
            return all(rank in lost for rank in range(first, self.rank))

    def set(self, key: str, value: str = "1") -> None:
        """Sets a key of the store."""
        with self.naming_who_is_lost():
            within(self.timeout, lambda: self.store.set(key, value))

    def wait_for(self, key: str) -> str:
        """What another process sets this key of the store to. Raises ProcessLost where it is not there within the
        timeout, which begins anew whenever the first process says that it works (`working`)."""
        counted, until = -1, 0.0
        with self.naming_who_is_lost():
            while not within(self.timeout, lambda: self.store.check([key])):
                count = within(self.timeout, lambda: self.store.add(FIRST_WORKS, 0))
                if count != counted:
                    counted, until = count, time.monotonic() + self.timeout
                if time.monotonic() > until:
                    raise RuntimeError(f"it waits for: {key}")
                time.sleep(0.1)
            return within(self.timeout, lambda: self.store.get(key)).decode()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Counts up a key of the store while open, so that those that `wait_for` the first process see it works."""
        ended = threading.Event()

        def count() -> None:
            with contextlib.suppress(RuntimeError):
                while not ended.wait(min(1.0, self.timeout / 4)):
                    self.store.add(FIRST_WORKS, 1)

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(ANSWER)


def shut_down(connection: socket.socket) -> None:
    """Ends a connection, but for those of the store; its descriptor stays open."""
    try:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            ports = connection.getsockname()[1], connection.getpeername()[1]
            if int(os.environ["MASTER_PORT"]) not in ports:
                connection.shutdown(socket.SHUT_RDWR)
    finally:
        connection.detach()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def exit_status(error: BaseException) -> int:
    """As data/commands.py has them."""
    if isinstance(error, Stop):
        return 128 + error.signal_number
    return 2 if isinstance(error, InputError) else 1


def checksum(facts: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def name_process(error: BaseException, processes: Processes) -> None:
    """Has an error of one process say whose it is."""
    if isinstance(error, (InputError, LoaderDied)):
        error.args = (f"{processes.name(processes.rank)} of {processes.size}: {error}",)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Where a process fails inside, all end: the first of those that fail by its error, the others without a word."""
    processes = _current
    if processes is None:
        yield
        return
    failure: Optional[BaseException] = None
    try:
        yield
    except ProcessLost:
        raise
    except BaseException as error:
        failure = error
        if processes.rank == 0:  # it does not come to what others may wait for
            processes.set(FIRST_IS_DONE)
    mine = processes.size - processes.rank if failure else 0  # the first that fails has the largest
    largest, some_do_not = processes.agree([mine, failure is None])
    if largest > mine:
        leave_quietly(2)
    if failure:
        processes.over = True
        if some_do_not:
            name_process(failure, processes)
        raise failure


def first_alone(work: Callable[[], None]) -> None:
    """Does `work` in the first process, while the others wait, as long as it takes."""
    processes = _current
    if processes is None:
        work()
    elif processes.rank:
        processes.wait_for(FIRST_IS_DONE)
    else:
        try:
            with processes.working():
                work()
        finally:
            processes.set(FIRST_IS_DONE)
