"""How the passes of a step run in one process, and in several that have all weights each: data parallel training.

Gradients are summed over the processes once a step, and not by the hooks of DDP: the CPU's kernels add to `.grad`
themselves. The sums begin inside the last backward pass, as soon as it leaves a block.
"""

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Protocol, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch.nn import Parameter

from bert.engines.parallel.processes import Processes
from bert.model.batch import Batch, State
from bert.model.model import Model
from bert.signals import Stop, cancellable

__all__ = ["Alone", "DataParallel", "Metrics", "MicroBatches", "Parallel", "Work", "with_next"]

BUCKET_BYTES = 25 * 2**20  # of gradients in one all-reduce: fewer are slow to start, more are late to finish
ALIGNMENT = 16  # elements at which a gradient begins in its bucket: kernels read several at once

T = TypeVar("T")
Metrics = Dict[str, torch.Tensor]
SumAcross = Optional[Callable[[torch.Tensor], None]]
MicroBatches = Iterator[Tuple[int, Batch]]
"""(its first row, micro-batch) each."""


@dataclass
class Work:
    """What is done with each micro-batch of a step."""

    forward: Callable[[Batch], Tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
    """To its loss and metrics."""
    backward: Callable[[torch.Tensor], None] = lambda loss: None
    seed: Callable[..., None] = lambda first, stage=0: None
    """Sets the random numbers of a stage for the micro-batch that begins with this row."""
    progress: Callable[[], None] = lambda: None
    """Is called as one is done."""
    totals: Metrics = field(default_factory=dict)
    """The metrics of all so far."""
    outputs: List[torch.Tensor] = field(default_factory=list)
    """What a `forward` that predicts has found so far."""

    def __call__(self, first: int, micro_batch: Batch) -> None:
        self.seed(first)
        loss, metrics = self.forward(micro_batch)
        self.backward(loss)
        self.add(metrics)

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.progress()


class Parallel(Protocol):
    """How the micro-batches of a step are run."""

    sharded: bool
    """Whether this process holds a part of the weights or of the optimizer's state only."""
    gathers: bool
    """Whether weights are gathered when a layer computes."""
    static: bool
    """Whether all micro-batches must have the same shapes."""
    can_redo: bool
    """Whether a step that failed in one process can be done again."""
    sum_across: SumAcross
    """Of an optimizer's sums (bert/optimizers.py); None where they are the same in all processes."""
    holders: Mapping[str, int]
    """How many processes hold the same gradient of a parameter and add it to those sums; 1 where it is not listed."""

    def count(self, own: int) -> Optional[int]:
        """How many micro-batches to run, where this process has samples for `own` and all must run as many; None where
        they need not."""

    def run(self, micro_batches: MicroBatches, work: Work, training: bool) -> None:
        """Does all micro-batches of this process. Raises Stop, in all processes, where one is told to stop."""

    def finish(self, failed: bool) -> bool:
        """Ends a `run`, which failed or not in this process; whether all of it is to be done again."""

    def stop(self, stop: Stop) -> None:
        """Tells the other processes of a Stop that was raised in `run`."""


class Alone:
    """One process."""

    sharded, gathers, static, can_redo = False, False, False, True
    sum_across: SumAcross = None
    holders: Mapping[str, int] = {}

    def count(self, own: int) -> Optional[int]:
        return None

    def run(self, micro_batches: MicroBatches, work: Work, training: bool) -> None:
        for first, micro_batch in micro_batches:
            with cancellable():
                work(first, micro_batch)

    def finish(self, failed: bool) -> bool:
        return failed

    def stop(self, stop: Stop) -> None:
        pass


class DataParallel:
    """Each process has all weights. `masters` maps the model's parameters by name to those whose `.grad` is summed;
    `fold(names)` adds to them what the backward pass left in the model's parameters."""

    sharded, gathers, static, can_redo = False, False, False, True
    sum_across: SumAcross = None
    holders: Mapping[str, int] = {}

    def __init__(
        self,
        processes: Processes,
        model: Model,
        masters: Mapping[str, Parameter],
        fold: Callable[[Iterable[str]], None],
    ):
        self.processes, self.model, self.masters, self.fold = processes, model, masters, fold
        self.met = self.summing = False
        self.buckets = make_buckets(model, masters)
        self.sums: List[Tuple[dist.Work, torch.Tensor]] = []
        self.has_gradient: Dict[str, bool] = {}

    def count(self, own: int) -> Optional[int]:
        return None

    def run(self, micro_batches: MicroBatches, work: Work, training: bool) -> None:
        self.met = False
        last = None
        for this, following in with_next(micro_batches):
            if training and following is None:
                last = this
                break
            with cancellable():
                work(*this)
        self.met = True  # from here on all processes do the same
        self.processes.meet()
        if training:
            self.summing, self.sums, self.has_gradient = True, [], {}
            if last is not None:
                with Watched(self.model, self.sum_from):
                    work(*last)

    def stop(self, stop: Stop) -> None:
        if not self.met:
            self.processes.meet(stopped=stop.signal_number)

    def sum_from(self, block: int) -> None:
        """Begins to sum the gradients that are complete when the backward pass has left this block."""
        while len(self.sums) < len(self.buckets) and self.buckets[len(self.sums)][0] >= block:
            _, names = self.buckets[len(self.sums)]
            self.fold(names)
            self.has_gradient.update({name: self.masters[name].grad is not None for name in names})
            flat = flatten([self.masters[name] for name in names])
            with self.processes.naming_who_is_lost():
                self.sums.append((dist.all_reduce(flat, async_op=True), flat))

    def finish(self, failed: bool) -> bool:
        """Sums what is left to sum. Where the last pass failed in one process, all do all of it again."""
        if not self.summing:
            return failed
        self.summing = False
        self.sum_from(0)
        with self.processes.naming_who_is_lost():
            for work, _ in self.sums:
                work.wait()
        self.sums = []
        failed_anywhere, *has_gradient = self.processes.agree([failed, *self.has_gradient.values()])
        for name, there in zip(self.has_gradient, has_gradient):
            if not there:
                self.masters[name].grad = None
        return bool(failed_anywhere)


class Watched:
    """While open, `left(i)` is called as a backward pass of the model has left block i, and all after it."""

    def __init__(self, model: Model, left: Callable[[int], None]):
        self.model, self.blocks, self.left = model, model.blocks, left

    def __enter__(self) -> None:
        self.model.blocks = [(name, self.watch(i, module)) for i, (name, module) in enumerate(self.blocks)]

    def __exit__(self, *exception) -> None:
        self.model.blocks = self.blocks

    def watch(self, i: int, module: Callable[[State], State]):
        def block(state: State) -> State:
            if state.hidden.requires_grad:
                # Gradients of a block's parameters are there before that of its input is handed on.
                state.hidden.register_hook(lambda gradient: self.left(i))
            return module(state)

        return block


def make_buckets(model: Model, masters: Mapping[str, Parameter]) -> List[Tuple[int, List[str]]]:
    """(block, names): the gradients of these parameters are complete when the backward pass has left this block, the
    last one first. A parameter of several blocks is its first one's; one that is in no block counts as the first's."""
    owner: Dict[Parameter, int] = {}
    for i, (_, module) in enumerate(model.blocks):
        for parameter in module.parameters():
            owner.setdefault(parameter, i)
    places = {name: owner.get(parameter, 0) for name, parameter in model.named_parameters() if name in masters}
    names = sorted(places, key=lambda name: -places[name])
    return [(places[bucket[-1]], bucket) for bucket in buckets_of(names, masters)]


def buckets_of(names: Iterable[str], parameters: Mapping[str, Parameter]) -> Iterator[List[str]]:
    """The names in lists of up to BUCKET_BYTES of float32 gradients, or of a single one."""
    bucket: List[str] = []
    size = 0
    for name in names:
        size += 4 * parameters[name].numel()
        if bucket and size > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 4 * parameters[name].numel()
        bucket.append(name)
    if bucket:
        yield bucket


def flatten(parameters: Sequence[Parameter]) -> torch.Tensor:
    """The gradients of parameters one after the other, zeros where there is none; from now on theirs are parts of
    it."""
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split(sizes)):
        gradient = part[: parameter.numel()].view_as(parameter)
        if parameter.grad is not None:
            gradient.copy_(parameter.grad)
        parameter.grad = gradient
    return flat


def with_next(items: Iterator[T]) -> Iterator[Tuple[T, Optional[T]]]:
    """Each item and the one after it, None after the last."""
    before = next(items, None)
    while before is not None:
        following = next(items, None)
        yield before, following
        before = following
