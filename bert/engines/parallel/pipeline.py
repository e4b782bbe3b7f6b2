"""Pipeline parallel: each process holds some stages of the model, on torch.distributed.pipelining.

The processes are a table: `pipeline` rows of one stage each (or, interleaved, of several), and as many columns as there
are copies of the model. Micro-batches go down a column, one after the other; gradients are summed along the rows. A
parameter that stages of several processes use, such as the word embedding that is the decoder too, is held by each of
them, and its gradients are summed.

Shape letters: R rows of a micro-batch, L token slots of a row, H hidden; T = R L.
"""

import collections
import datetime
import itertools
from typing import Any, Callable, Deque, Dict, Iterable, List, Mapping, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from bert.engines.parallel.processes import Processes
from bert.engines.parallel.reduction import MicroBatches, SumAcross, Work, buckets_of, flatten
from bert.model.batch import Batch, State
from bert.model.model import Model
from bert.model.stages import pipeline_stages
from bert.signals import Stop
from ops.attention import for_layers
from ops.shards import local_part

__all__ = ["Layout", "Pipelined", "StageModule"]

ROUND = 16  # micro-batches of each process between two looks for a signal


class Layout:
    """Who holds which stages: of the process with this `rank` among `size`.

    Raises InputError where there is no layer for each stage.
    """

    def __init__(self, model: Model, pipeline: int, stages_per_process: int, rank: int, size: int):
        self.pipeline, self.copies = pipeline, size // pipeline
        self.place = rank // self.copies
        self.stages = pipeline_stages([name for name, _ in model.blocks], pipeline, stages_per_process)
        modules = dict(model.blocks)
        users: Dict[Parameter, Set[int]] = {}
        for stage in self.stages:
            for block in stage.blocks:
                for module in modules_of(modules[block]):
                    for parameter in module.parameters():
                        users.setdefault(parameter, set()).add(stage.ipu)
        self.users = {name: sorted(users.get(p, {0})) for name, p in model.named_parameters()}
        """Parameter name -> the places in the pipeline that hold it."""

    def make_mesh(self, device: str, timeout: float) -> Any:
        """Of all processes, ["pipeline", "copies"]; waits `timeout` seconds for each of them."""
        from torch.distributed.device_mesh import DeviceMesh

        table = torch.arange(self.pipeline * self.copies).view(self.pipeline, self.copies)
        own = []
        for lines in (table.t(), table):  # all processes make the same groups
            groups = [(line.tolist(), new_group(line.tolist(), timeout)) for line in lines]
            own.append(next(group for ranks, group in groups if dist.get_rank() in ranks))
        return DeviceMesh.from_group(own, device, mesh=table, mesh_dim_names=("pipeline", "copies"))

    def shares_layers(self, model: Model) -> bool:
        """Whether several stages of one process have a layer in common."""
        modules = dict(model.blocks)
        held = [(stage.ipu, layer) for stage in self.stages for layer in {modules[name] for name in stage.blocks}]
        return len(held) > len(set(held))

    def stage_modules(self, model: Model) -> List["StageModule"]:
        """Of this process."""
        last = len(self.stages) - 1
        own = [(number, stage) for number, stage in enumerate(self.stages) if stage.ipu == self.place]
        return [StageModule(model, number, stage.blocks, number == last) for number, stage in own]

    def holds(self, name: str) -> bool:
        """Whether this process holds the parameter of this name."""
        return self.place in self.users[name]

    def empty_others(self, model: Model) -> None:
        """Frees the parameters that other processes hold."""
        for name, parameter in model.named_parameters():
            if not self.holds(name):
                parameter.data = parameter.data.new_empty(0)

    def groups_of_tied(self) -> List[Tuple[List[int], List[str]]]:
        """(ranks, names) of parameters that several processes of this one's pipeline hold; all processes of the run
        make the same groups."""
        tied: Dict[Tuple[int, ...], List[str]] = {}
        for name, places in self.users.items():
            if len(places) > 1:
                tied.setdefault(tuple(places), []).append(name)
        groups = itertools.product(range(self.copies), tied.items())
        return [([place * self.copies + copy for place in places], names) for copy, (places, names) in groups]


def new_group(ranks: Sequence[int], timeout: float) -> Any:
    return dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout))


def modules_of(block: nn.Module) -> List[nn.Module]:
    """A block, and the modules that stand elsewhere in the model and that it names in `shared`."""
    return [block, *(module for module in getattr(block, "shared", ()) if module is not None)]


class StageModule(nn.Module):
    """A stage: from the hidden state of the stage before it to its own, [T, H] or [R, L, H], or to the loss, [1]."""

    def __init__(self, model: Model, number: int, blocks: Sequence[str], is_last: bool):
        super().__init__()
        self.run, self.number, self.is_first, self.is_last = model.run, number, number == 0, is_last
        modules = dict(model.blocks)
        self.blocks = [(name, modules[name]) for name in blocks]
        self.held = nn.ModuleList(part for _, module in self.blocks for part in modules_of(module))
        self.micro_batches: Deque[Tuple[int, Batch]] = collections.deque()
        self.seed: Callable[[int, int], None] = lambda first, stage: None
        self.metrics: List[Mapping[str, torch.Tensor]] = []
        self.outputs: List[torch.Tensor] = []

    @property
    def layers(self) -> Dict[str, nn.Module]:
        """The encoder's layers among its blocks, by name."""
        return {name: module for name, module in self.blocks if name.startswith("layer")}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next of the `micro_batches`. The first stage's `hidden` is not used."""
        first, batch = self.micro_batches.popleft()
        self.seed(first, self.number)
        state = State(batch, batch.segments)
        if not self.is_first:
            state = state._replace(segments=for_layers(batch.segments, hidden.dtype), hidden=hidden)
        state = self.run(state, self.blocks)
        if not self.is_last:
            return state.hidden
        self.metrics.append(state.metrics)
        self.outputs.append(state.outputs)
        return state.loss.reshape(1)


class Pipelined:
    """`masters`: the parameters of this process whose `.grad` is summed; `fold(names)` adds to them what the backward
    pass left in the model's. `gathered`: the modules of `shard`, where the copies of a stage hold a part of it each.
    `dtype` and `hidden_size` are those of what goes from stage to stage."""

    sharded, static, can_redo = True, True, False

    def __init__(
        self,
        processes: Processes,
        layout: Layout,
        mesh: Any,
        modules: List[StageModule],
        gathered: List[Any],
        masters: Mapping[str, Parameter],
        fold: Callable[[Iterable[str]], None],
        dtype: torch.dtype,
        hidden_size: int,
    ):
        self.column, self.row = mesh["pipeline"].get_group(), mesh["copies"].get_group()
        self.tied: List[Tuple[Any, List[str]]] = []
        for ranks, names in layout.groups_of_tied():
            group = new_group(ranks, processes.timeout)
            if processes.rank in ranks:
                self.tied.append((group, names))
        self.processes, self.layout, self.masters, self.fold = processes, layout, masters, fold
        self.modules, self.gathered, self.device = modules, gathered, mesh.device_type
        self.gathers = bool(gathered)
        self.dtype, self.hidden_size = dtype, hidden_size
        self.schedules: Dict[bool, Tuple[Any, Any]] = {}
        self.sum_across: SumAcross = self.sum_skips
        alike = 1 if gathered else layout.copies
        self.holders: Mapping[str, int] = {name: alike * len(layout.users[name]) for name in masters}

    def count(self, own: int) -> int:
        """Of micro-batches, in all pipelines: in rounds of one size, in which each process of a pipeline has as many to
        begin with as another."""
        each = max(1, -(-self.processes.meet(own) // self.layout.pipeline))
        rounds = -(-each // ROUND)
        self.round = -(-each // rounds) * self.layout.pipeline
        return rounds * self.round

    def run(self, micro_batches: MicroBatches, work: Work, training: bool) -> None:
        while True:
            some = list(itertools.islice(micro_batches, self.round))
            if not some:
                break
            self.processes.meet()
            for module in self.modules:
                module.micro_batches, module.seed = collections.deque(some), work.seed
                module.metrics, module.outputs = [], []
            with self.processes.naming_who_is_lost(computing=True):
                self.do_round(some[0][1].input_ids.shape, training)
            for metrics in self.modules[-1].metrics or [{}] * len(some):
                work.add(metrics)
            work.outputs += self.modules[-1].outputs
        if training:
            self.sum_gradients()
            return
        for module in self.gathered:
            module.reshard()  # what was gathered would not see the next update

    def do_round(self, shape: torch.Size, training: bool) -> None:
        """Of the modules' micro-batches, whose tokens have this shape."""
        key, numbers = (self.round, shape), torch.zeros(self.round)  # a number for each micro-batch, that nobody reads
        inputs = (numbers,) if self.modules[0].is_first else ()
        target = numbers if self.modules[-1].is_last else None
        kept = {}
        if self.schedules.get(training, (None,))[0] != key:  # the newest alone is kept: it has room for all it receives
            self.schedules[training] = key, self.make_schedule(shape, training)
            if self.gathered:  # the first round of a schedule clears the gradients of FSDP2's parameters
                kept = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        schedule = self.schedules[training][1]
        (schedule.step if training else schedule.eval)(*inputs, target=target)
        for name, gradient in kept.items():
            master = self.masters[name]
            master.grad = gradient if master.grad is None else master.grad + gradient

    def make_schedule(self, shape: torch.Size, training: bool) -> Any:
        from torch.distributed import pipelining

        stages: List[Any] = []
        example: Dict[str, Any] = dict(device="meta", requires_grad=training)
        hidden = torch.empty(*shape, self.hidden_size, dtype=self.dtype, **example)
        for module in self.modules:
            before = torch.zeros(1) if module.is_first else hidden
            after = torch.empty(1, **example) if module.is_last else hidden
            options: Dict[str, Any] = dict(input_args=before, output_args=after, group=self.column)
            place = module.number, len(self.layout.stages), torch.device(self.device)
            stages.append(pipelining.PipelineStage(module, *place, **options))
        options = dict(loss_fn=lambda loss, target: loss.sum(), scale_grads=False)
        if len(stages) == 1:
            return pipelining.Schedule1F1B(stages[0], self.round, **options)
        return pipelining.ScheduleInterleaved1F1B(stages, self.round, **options)

    def sum_gradients(self) -> None:
        """Of what several processes of a pipeline hold, then, unless FSDP2 did it, of all pipelines."""
        self.fold(self.masters)
        is_whole = self.layout.copies > 1 and not self.gathered
        everything = [(self.row, list(self.masters))] if is_whole else []
        for group, names in [*self.tied, *everything]:
            names = [name for name in names if self.masters[name].grad is not None]
            with self.processes.naming_who_is_lost():
                if self.gathered:
                    sums = [local_part(self.masters[name].grad) for name in names]
                else:
                    sums = [flatten([self.masters[name] for name in some]) for some in buckets_of(names, self.masters)]
                for work in [dist.all_reduce(each, group=group, async_op=True) for each in sums]:
                    work.wait()

    def finish(self, failed: bool) -> bool:
        return failed

    def stop(self, stop: Stop) -> None:
        pass

    def sum_skips(self, sums: torch.Tensor) -> None:
        """Norms are those of this stage's parameters; whether the update is skipped is all processes' business."""
        with self.processes.naming_who_is_lost():
            if self.gathered:
                dist.all_reduce(sums[:-1], group=self.row)
            dist.all_reduce(sums[-1:])
