"""The engine for CPUs and GPUs: a step is a loop over micro-batches."""

import functools
import gc
import logging
import time
from typing import Any, Callable, ContextManager, Dict, Iterable, List, Mapping, Optional, Tuple, TypeVar

import numpy as np
import torch
from torch import nn

from bert.config import Config
from bert.engines.engine import Arrays, ignore_progress
from bert.engines.parallel.pipeline import Layout, Pipelined
from bert.engines.parallel.processes import current
from bert.engines.parallel.reduction import Alone, DataParallel, Metrics, MicroBatches, Parallel, Work
from bert.engines.parallel.sharded import Sharded, make_mesh, shard
from bert.engines.torch_devices import Memory, TorchDevice, choose_precision, wants_compile
from bert.model.batch import NOTHING, Batch
from bert.model.model import Model
from bert.optimizers import make_optimizer
from bert.signals import Stop, protected
from bert.tasks.task import ExampleTask, Task
from data.errors import InputError
from data.rows import unpad
from ops.attention import has_varlen_kernel
from ops.native import packed_weights
from ops.shards import is_dtensor, local_part, part_of

__all__ = ["TorchEngine"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TorchEngine:
    """Trains `model` on one device; `bert.engines.engine.Engine` says what its methods do.

    The model's parameters are in the type that it computes in, LayerNorms' too: what they give is rounded to it anyway.
    `master_weights`, which the optimizer updates, are float32: in float32 the same tensors, else each update rounds
    them into the model's. Dropout draws from a generator state of its own: a function of (seed, step, rank, first row
    of the micro-batch), so that a run is repeatable whatever else draws random numbers. On CUDA it is so to rounding:
    flash attention adds up the gradients of the queries in any order, unless torch.use_deterministic_algorithms(True)
    is set.

    Of several processes each gets its own rows of a global batch (bert/engines/parallel/).
    """

    steps_per_call = 1
    made_up = False
    stops_together = True

    def __init__(self, config: Config, task: Task, model: Model, device: TorchDevice, micro_batch_size: int):
        device.start(keeps_memory=config.parallel.shard == "none")
        training, self.processes = config.training, current()
        self.rank, self.world_size = (self.processes.rank, self.processes.size) if self.processes else (0, 1)
        self.task, self.device, self.seed, self.micro_batch_size = task, device, training.seed, micro_batch_size
        self.model, self.asynchronous = model, device.asynchronous
        self.precision = choose_precision(device, training.precision)
        model.float8 = self.precision == "float8"
        self.dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        self.parallel = self.place(config)
        pipelines = f" in pipelines of {config.parallel.pipeline}" if config.parallel.pipeline > 1 else ""
        shards = f", shard {config.parallel.shard}" if self.parallel.gathers else ""
        self.share_line = f"{self.world_size} processes{pipelines}{shards}, " if self.processes else ""
        self.sharded = self.parallel.sharded
        compute_weights: Dict[torch.Tensor, torch.Tensor] = {}
        if self.parameters is not self.master_weights:
            compute_weights = {self.master_weights[name]: weight.detach() for name, weight in self.parameters.items()}
        named, parallel = self.master_weights.items(), self.parallel
        sums = parallel.sum_across, parallel.holders
        self.optimizer = make_optimizer(named, config.optimizer, compute_weights, *sums)
        self.steps_done = 0
        self.done_events: Dict[int, Any] = {}
        self.compiled, self.compile_line = wants_compile(device, training.compile)
        self.compile_setting = training.compile
        head_size = config.model.hidden_size // config.model.num_attention_heads
        has_kernels = device.compiles_kernels or not self.compiled
        self.unpads = has_kernels and has_varlen_kernel(device.name, self.dtype, head_size)
        # One number of tokens for all micro-batches, or each would be compiled anew, and a float8 product takes them by
        # 16.
        self.static = self.compiled or model.float8 or self.parallel.static
        self.cuts_evenly = device.memory is not None and not training.micro_batch_size
        if self.compiled:
            for layer in set(model.layers.values()):
                layer.compile(dynamic=False)

    def place(self, config: Config) -> Parallel:
        """Puts the parameters that this process holds on the device, and finds how processes share the work."""
        parallel, model, device = config.parallel, self.model, self.device.name
        layout, stages, gathered = None, [], []
        if self.processes and parallel.pipeline > 1:
            layout = Layout(model, parallel.pipeline, parallel.stages_per_process, self.rank, self.world_size)
            if parallel.shard != "none" and layout.shares_layers(model):
                raise InputError(
                    f'parallel.shard is "{parallel.shard}", expected "none": stages of one process share layers. Or '
                    "set parallel.stages_per_process to 1"
                )
            mesh, stages = layout.make_mesh(device, parallel.timeout), layout.stage_modules(model)
            layout.empty_others(model)
        if self.processes and parallel.shard != "none":
            copies = mesh["copies"] if layout else make_mesh(device, self.world_size)
            roots: List[Any] = [*stages] or [model]
            for root in roots:
                gathered += shard(root, root.layers.values(), copies, self.dtype, full=parallel.shard == "full")
        else:
            model.to(device)
        own = {name: p for name, p in model.named_parameters() if layout is None or layout.holds(name)}
        self.parameters = self.master_weights = own
        if self.dtype != torch.float32 and not gathered:
            self.master_weights = {name: nn.Parameter(weight.detach().clone()) for name, weight in own.items()}
            model.to(self.dtype)
            self.parameters = {name: p for name, p in model.named_parameters() if name in own}
            for name, weight in self.parameters.items():
                # To its gradient the CPU's kernels add (ops/native.py).
                weight.master = self.master_weights[name]  # type: ignore[attr-defined]
                if layout:  # many backward passes follow each other in there
                    weight.register_post_accumulate_grad_hook(functools.partial(self.fold_one, name))
        if self.processes is None:
            return Alone()
        sums = self.master_weights, self.fold
        if layout:
            parts = mesh, stages, gathered
            return Pipelined(self.processes, layout, *parts, *sums, self.dtype, config.model.hidden_size)
        if gathered:
            return Sharded(self.processes, gathered, full=parallel.shard == "full")
        return DataParallel(self.processes, model, *sums)

    def describe(self) -> str:
        return f"{self.share_line}{self.precision}, micro-batches of {self.micro_batch_size} rows, {self.compile_line}"

    def compile(self) -> None:
        """Nothing: layers are compiled as they first run."""

    def expect_rows(self, rows: int) -> None:
        """Makes micro-batches smaller such that as many do, with few rows to fill up."""
        if self.cuts_evenly and rows:
            count = -(-rows // self.micro_batch_size)
            # Later batches may pack into some more rows.
            self.micro_batch_size = min(self.micro_batch_size, -(-(rows + rows // 100) // (8 * count)) * 8)

    def step(
        self, batch: Arrays, learning_rate: float, step: int, progress: Callable[[int], None] = ignore_progress
    ) -> Metrics:
        totals = self.in_all_processes(self.passes, batch, step, progress)
        with protected():
            self.update(learning_rate)
            self.steps_done = step
            totals["skipped_updates"] = self.optimizer.skipped.clone()
            return self.to_host(totals, step)

    def in_all_processes(self, passes: Callable[..., Metrics], *arguments) -> Metrics:
        """passes(*arguments), summed over all processes."""
        totals = self.stopping_together(passes, *arguments)
        if self.processes is None:
            return totals
        return self.processes.sum_metrics(totals, list(self.task.metrics), self.device.name)

    def stopping_together(self, passes: Callable[..., T], *arguments) -> T:
        """passes(*arguments). Where one process is told to stop before all are done, all raise Stop."""
        try:
            return self.until_it_fits(passes, *arguments)
        except Stop as stop:
            self.parallel.stop(stop)
            raise

    def passes(self, batch: Arrays, step: int, progress: Callable[[int], None]) -> Metrics:
        """The forward and backward passes of a step."""
        self.model.train()
        self.clear_gradients()
        rows, rows_done = len(batch["input_ids"]), 0

        def seed(first: int, stage: int = 0) -> None:
            place = [first, self.rank, stage] if self.rank or stage else [first]
            key = np.random.SeedSequence([self.seed, step, *place]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(key >> np.uint64(1)))

        def one_done() -> None:
            nonlocal rows_done
            done = min(self.micro_batch_size, rows - rows_done)
            rows_done += done
            progress(done)

        work = Work(self.model, self.backward, seed, one_done)
        try:
            with self.device.fork_random(), self.packed_weights(batch):
                self.run(batch, work, training=True)
        except Exception:  # `until_it_fits` may begin again
            progress(-rows_done)
            raise
        return work.totals

    def run(self, batch: Arrays, work: Work, training: bool) -> None:
        """Does `work` for all micro-batches of a batch."""
        count = self.parallel.count(-(-len(batch["input_ids"]) // self.micro_batch_size))
        self.parallel.run(self.micro_batches(batch, count), work, training)

    @torch.no_grad()
    def evaluate(self, batch: Arrays) -> Metrics:
        return self.in_all_processes(self.evaluation, batch)

    def evaluation(self, batch: Arrays) -> Metrics:
        self.model.eval()
        work = Work(self.model)
        with self.packed_weights(batch):
            self.run(batch, work, training=False)
        return work.totals

    @torch.no_grad()
    def predict(self, batch: Arrays) -> np.ndarray:
        return self.stopping_together(self.prediction, batch)

    def prediction(self, batch: Arrays) -> np.ndarray:
        task = self.task
        assert isinstance(task, ExampleTask)
        self.model.eval()
        outputs: List[torch.Tensor] = []

        def forward(micro_batch: Batch) -> Tuple[torch.Tensor, Metrics]:
            outputs.append(self.model(micro_batch, predicts=True))
            return NOTHING, {}

        work = Work(forward, outputs=outputs)
        with self.packed_weights(batch):
            self.run(batch, work, training=False)
        if not outputs:
            return np.empty((0, task.output_size), np.float32)
        found = torch.cat([output.float().cpu() for output in outputs]).numpy()
        if not self.unpads or (self.static and task.output_slots == "sample_ids"):  # padding has outputs, too
            used = batch[task.output_slots].ravel() != 0
            found = found[: len(used)][used]
        return found

    def packed_weights(self, batch: Arrays) -> ContextManager:
        """While open, the weights stay as they are, for the micro-batches of this batch."""
        moves = self.parallel.gathers  # what is gathered has its memory for a while only
        return packed_weights(0 if moves else -(-len(batch["input_ids"]) // self.micro_batch_size))

    def until_it_fits(self, passes: Callable[..., T], *arguments) -> T:
        """passes(*arguments), from the beginning again with smaller micro-batches where memory runs out, and without
        compiled layers where the compiler fails; where they are asked for, raises InputError.

        All of a step is done again, for gradients are added up wherever `backward` adds them, and a pass that failed
        may have added some of its own.
        """
        while True:
            memory, reason = None, None
            try:
                result = passes(*arguments)
            except torch.cuda.OutOfMemoryError:  # its name on the CPU and in older versions, too
                memory = self.device.memory
                if memory is None or self.micro_batch_size == 1:
                    raise
                if not self.parallel.can_redo:
                    remedy = "Make them smaller with --training.micro_batch_size"
                    raise InputError(f"out of memory with micro-batches of {self.micro_batch_size} rows. {remedy}")
            except Exception as error:
                reason = compiler_error(error) if self.compiled else None
                if reason is None:
                    raise
                if self.compile_setting == "on" or not self.parallel.can_redo:
                    remedy = "auto" if self.parallel.can_redo else "off"
                    failure = f'training.compile is "{self.compile_setting}", but the compiler fails: {reason}'
                    raise InputError(f'{failure}. Set it to "{remedy}", which then trains without') from error
                self.leave_uncompiled(reason)
            if memory:
                self.shrink_micro_batch(memory)  # here, where no error holds the tensors of its frames any more
            if not self.parallel.finish(failed=bool(memory or reason)):
                return result

    def shrink_micro_batch(self, memory: Memory) -> None:
        rows = self.micro_batch_size * 3 // 4
        rows = rows // 8 * 8 or rows
        logger.warning(f"out of memory: micro-batches of {rows} rows from now on, not {self.micro_batch_size}")
        self.micro_batch_size = rows
        gc.collect()
        memory.reset_peak()

    def leave_uncompiled(self, reason: str) -> None:
        logger.warning(f"encoder layers cannot be compiled, and are slower without: {reason}")
        for layer in self.model.layers.values():
            layer._compiled_call_impl = None  # as Module.compile set it
        self.compiled, self.compile_line = False, "not compiled (the compiler fails)"

    def forward(self, micro_batch: Batch, totals: Metrics) -> torch.Tensor:
        """The loss of one micro-batch; adds its metrics to `totals`."""
        loss, metrics = self.model(micro_batch)
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of one micro-batch to those of the master weights."""
        loss.backward()
        self.fold(self.master_weights)

    def fold_one(self, name: str, weight: torch.Tensor) -> None:
        self.fold([name])

    def fold(self, names: Iterable[str]) -> None:
        """Adds gradients in the type that the model computes in to those of the master weights."""
        for name in names:
            parameter, master = self.parameters[name], self.master_weights[name]
            if parameter is not master and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def clear_gradients(self) -> None:
        for parameter in (*self.parameters.values(), *self.master_weights.values()):
            parameter.grad = None

    def update(self, learning_rate: float) -> None:
        """The optimizer's update, with the gradients of the step's micro-batches."""
        self.optimizer.step(learning_rate)

    def micro_batches(self, batch: Arrays, count: Optional[int] = None) -> MicroBatches:
        """(its first row, micro-batch on the device), one after the other. With `count` there are so many; without,
        those that have no sample are left out."""
        size = self.micro_batch_size
        for first in range(0, size * count if count is not None else len(batch["sample_ids"]), size):
            rows = {name: array[first : first + size] for name, array in batch.items()}
            is_empty = not rows["sample_ids"].any()
            if is_empty and count is None:
                continue
            missing = (size if self.static else int(is_empty)) - len(rows["input_ids"])
            if missing > 0:
                rows = add_empty_rows(rows, missing)
            if self.unpads:
                fields = self.to_device(unpad(rows, self.static or is_empty, self.task.targets))
                if self.compiled:  # for any number of samples
                    torch._dynamo.mark_dynamic(fields["cu_seqlens"], 0)
                yield first, Batch.of_unpadded(fields)
                continue
            for target in self.task.targets:
                if target.used:  # on the host, where it costs no wait for the device
                    rows[target.used] = np.flatnonzero(rows[target.weights])
            yield first, Batch.of_rows(self.to_device(rows))

    def to_device(self, fields: Mapping[str, Any]) -> Dict[str, Any]:
        send = self.device.to_device
        return {name: x if isinstance(x, int) else send(torch.from_numpy(x)) for name, x in fields.items()}

    def to_host(self, metrics: Metrics, step: int) -> Metrics:
        if not self.asynchronous:
            return metrics
        values = torch.stack([value.float() for value in metrics.values()])
        host, self.done_events[step] = self.device.to_host(values)
        return dict(zip(metrics, host.unbind()))

    def wait_for(self, step: int) -> None:
        if step in self.done_events:
            self.done_events[step].synchronize()
        self.done_events = {later: event for later, event in self.done_events.items() if later > step}

    def weights(self) -> Dict[str, torch.Tensor]:
        weights = {name: weight.detach() for name, weight in self.master_weights.items()}
        return {name: weight if is_dtensor(weight) else weight.cpu() for name, weight in weights.items()}

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                weight = self.master_weights[name]
                part = local_part(tensor) if is_dtensor(tensor) else part_of(tensor, weight)
                local_part(weight).copy_(part)
            for name, parameter in self.parameters.items():
                if parameter is not self.master_weights[name]:
                    parameter.copy_(self.master_weights[name])

    def optimizer_state(self) -> Dict[str, torch.Tensor]:
        return self.optimizer.state_dict()

    def skipped_updates(self) -> int:
        return int(self.optimizer.skipped)

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor], skipped_updates: int) -> None:
        self.optimizer.load_state_dict(tensors, skipped_updates)

    def measure(self, batch: Arrays) -> Dict[str, float]:
        """Of data, forward, backward and optimizer; the optimizer's learning rate is 0."""
        return self.until_it_fits(self.measure_passes, batch)

    def measure_passes(self, batch: Arrays) -> Dict[str, float]:
        seconds = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

        def timed(part: str, function: Callable, *arguments):
            before = self.now()
            result = function(*arguments)
            seconds[part] += self.now() - before
            return result

        self.model.train()
        self.clear_gradients()
        micro_batches = self.micro_batches(batch)
        with self.packed_weights(batch):
            while True:
                item = timed("data", next, micro_batches, None)
                if item is None:
                    break
                loss = timed("forward", self.forward, item[1], {})
                timed("backward", self.backward, loss)
        timed("optimizer", self.update, 0.0)
        return seconds

    def now(self) -> float:
        """Seconds, when the device is done with all that it was given."""
        self.device.synchronize()
        return time.perf_counter()


def compiler_error(error: Optional[BaseException]) -> Optional[str]:
    """What torch.compile or Triton says, in a line, where `error` comes from them; a layer's backward pass is compiled
    as it first runs. Not where torch was told to raise an error rather than compile anew."""
    while error is not None and not type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
        error = error.__cause__ or error.__context__
    if error is None or isinstance(error, torch._dynamo.exc.RecompileError):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).splitlines()[:2])}"


def add_empty_rows(rows: Arrays, count: int) -> Dict[str, np.ndarray]:
    """The rows, and `count` of padding."""
    return {name: np.concatenate([x, np.zeros((count, *x.shape[1:]), x.dtype)]) for name, x in rows.items()}
