"""The processes that torchrun starts, as one group of torch.distributed: what they agree on, and how they end.

The weights of a batch sum to 1 over the global batch (data/rows.py), so gradients and metrics are sums over the
processes, without a division.
"""

import contextlib
import datetime
import time
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from bert.engines.choosing import process_of
from bert.errors import ProcessLost
from bert.signals import Stop, cancellable
from data.errors import InputError

__all__ = ["Processes", "current", "failing_together", "first_alone", "joined"]

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
FIRST_IS_DONE = "first is done"

_current: Optional["Processes"] = None


def current() -> Optional["Processes"]:
    """The processes that this one has `joined`; None where it runs alone."""
    return _current


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[None]:
    """While open, this process and the others that torchrun started are one group, which waits `timeout` seconds for
    each of them; nothing for a process alone, or on IPUs.

    Raises InputError where they do not find each other.
    """
    global _current
    if device not in BACKENDS or process_of(device)[1] == 1:
        yield
        return
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of the run do not find each other: {first_line(error)}. Start them with torchrun "
            "--nproc-per-node N run_pretraining.py ..., or unset WORLD_SIZE"
        )
    _current = Processes(rank, size, store)
    try:
        yield
    except (
        Stop
    ):  # of all of them: torchrun ends the others as soon as one is gone, so none goes before the first is done
        with contextlib.suppress(ProcessLost):
            _current.agree([])
        raise
    finally:
        _current = None
    # After an error, connections are closed as the process ends: others may wait for that (`failing_together`).
    dist.destroy_process_group()


class Processes:
    """The processes of a run, as the one with this `rank` sees them. What its methods do, all do at the same place.

    They raise ProcessLost where another process has ended or does not come.
    """

    def __init__(self, rank: int, size: int, store: "dist.Store"):
        self.rank, self.size, self.store = rank, size, store
        self.meetings = 0

    def agree(self, values: Sequence[int]) -> List[int]:
        """The largest of each value over all processes; the host waits for it, the device does not."""
        self.meetings += 1
        with self.naming_who_is_lost():
            self.store.set(str(self.rank), str(self.meetings))
            largest = torch.tensor([0, *values])
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()[1:]

    def meet(self, number: int = 0) -> int:
        """Meets all processes, and returns the largest `number`. Raises Stop in all where one was told to stop."""
        stopped = 0
        try:
            with cancellable():
                pass
        except Stop as stop:
            stopped = stop.signal_number
        stopped, number = self.agree([stopped, number])
        if stopped:
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

    @contextlib.contextmanager
    def naming_who_is_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = [f"process {rank}" for rank in range(self.size) if self.is_behind(rank)]
            raise ProcessLost(
                f"process {self.rank} of {self.size}: {', '.join(lost) or 'another process'} has ended or hangs "
                f"({first_line(error)}). Start again with --resume auto"
            ) from error

    def is_behind(self, rank: int) -> bool:
        """Whether a process did not come where this one is, as far as the store still knows."""
        try:
            return not self.store.check([str(rank)]) or int(self.store.get(str(rank))) < self.meetings
        except RuntimeError:
            return False


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Where a process fails inside, all end: the first of those that fail by its error, the others without a word."""
    processes = _current
    if processes is None:
        yield
        return
    mine = processes.size - processes.rank  # the first that fails has the largest
    try:
        yield
        mine = 0
    finally:
        (largest,) = processes.agree([mine])
        if largest > mine:
            with contextlib.suppress(ProcessLost):
                processes.agree([])  # until the other is gone: torchrun ends all as soon as one is
            raise SystemExit(2)


def first_alone(work: Callable[[], None]) -> None:
    """Does `work` in the first process, while the others wait, as long as it takes."""
    processes = _current
    if processes is None:
        work()
    elif processes.rank:
        while not processes.store.check([FIRST_IS_DONE]):
            time.sleep(0.2)
    else:
        try:
            work()
        finally:
            processes.store.set(FIRST_IS_DONE, "1")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
