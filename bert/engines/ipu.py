"""The engine for IPUs, through PopTorch: a step is one call of the compiled executable.

Shape letters: R rows, L tokens of a row, M mask slots of a row, S samples of a row.
"""

import importlib
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from bert.config import Config
from bert.engines.choosing import process_of
from bert.engines.engine import Arrays, ignore_progress
from bert.engines.ipu_optimizer import check_ipu_state, make_ipu_optimizer, read_state, write_state
from bert.engines.torch_engine import add_empty_rows
from bert.geometry import samples_per_row
from bert.model.batch import Batch
from bert.model.model import Model
from bert.model.stages import Stage, make_stages, placement
from bert.signals import cancellable
from bert.tasks.task import ExampleTask, Task
from data.errors import InputError
from ops.ipu import lowering

__all__ = ["IpuEngine", "IpuModel", "make_options"]


class IpuModel(nn.Module):
    """What PopTorch compiles: the tensors `inputs` of a micro-batch of rows -> the loss and the task's metrics,
    scalars; to evaluate an ExampleTask, its outputs, too.

    In training the loss that is differentiated is `micro_batches` times the model's: PopTorch takes the mean over so
    many micro-batches, whose weights sum to 1 over all of them. So each has a loss of the usual size, which float16
    needs.
    """

    def __init__(self, config: Config, task: Task, model: Model, stages: Sequence[Stage], poptorch):
        super().__init__()
        self.model, self.task, self.inputs = model, task, inputs_of(task)
        ipu = config.ipu
        self.lowering = lambda: lowering(
            poptorch,
            placement(stages),
            ipu.recompute_checkpoint_every_layer,
            ipu.gradient_accumulation_steps * ipu.replication_factor,
            ipu.operation_proportions,
        )

    def forward(self, *tensors):
        with self.lowering():
            state = self.model.whole(Batch.of_rows(dict(zip(self.inputs, tensors))))
        found = (state.loss,) + tuple(state.metrics[name] for name in self.task.metrics)
        return found if self.training or not isinstance(self.task, ExampleTask) else found + (state.outputs,)


def inputs_of(task: Task) -> List[str]:
    """The fields of rows that the model takes, in order."""
    fields = ["input_ids", "token_type_ids", "position_ids", "sample_ids"]
    return fields + [name for target in task.targets for name in (target.positions, target.labels, target.weights)]


class IpuEngine:
    """Trains `model` on a pipeline of IPUs, in `ipu.replication_factor` replicas; `bert.engines.engine.Engine` says
    what its methods do.

    Under poprun each process feeds its part of the rows (`part_of`), and its metrics are those of its part. A call does
    `steps_per_call` optimizer steps, on as many global batches one after the other.
    """

    asynchronous = False

    def __init__(self, config: Config, task: Task, model: Model):
        self.poptorch = importlib.import_module("poptorch")
        self.config, self.ipu, self.task, self.model = config, config.ipu, task, model
        self.made_up = config.ipu.synthetic_data
        self.stages = make_stages(config.ipu.layers_per_ipu, config.ipu.matmul_proportion)
        self.micro_batch_size, self.steps_per_call = config.ipu.micro_batch_size, config.ipu.device_iterations
        self.steps_done = 0
        self.rank, self.world_size = process_of("ipu")
        self.stops_together = self.world_size == 1
        self.sharded = False
        if self.world_size > 1:
            self.check_poprun()
        self.half = config.training.precision != "float32"
        if self.half:
            model.half()
        self.inputs = inputs_of(task)
        self.optimizer = make_ipu_optimizer(self.poptorch, model.named_parameters(), config, self.half)
        self.compiled_model: Optional[IpuModel] = None
        self.training: Any = None
        self.inference: Any = None
        self.loaded: Optional[Dict[str, torch.Tensor]] = None

    def wrap(self) -> IpuModel:
        return IpuModel(self.config, self.task, self.model, self.stages, self.poptorch)

    def check_poprun(self) -> None:
        """Starts PopDist. Raises InputError where poprun was told something else than the config."""
        popdist = importlib.import_module("popdist")
        popdist.init()
        if self.config.compile_only:
            raise InputError(
                f"--compile-only compiles for one process, and poprun started {self.world_size}: leave it out; "
                "the first run under poprun compiles"
            )
        if popdist.getNumTotalReplicas() != self.ipu.replication_factor:
            raise InputError(
                f"ipu.replication_factor is {self.ipu.replication_factor}, and poprun started "
                f"{popdist.getNumTotalReplicas()} replicas: poprun --num-replicas "
                f"{self.ipu.replication_factor} ..., or a config for as many"
            )
        if self.world_size != self.ipu.instances:
            raise InputError(
                f"ipu.instances is {self.ipu.instances}, and poprun started {self.world_size} processes: poprun "
                f"--num-instances {self.ipu.instances} ..., or --ipu.instances {self.world_size} if --plan says it fits"
            )

    def options(self, training: bool):
        # Another seed where a run goes on: it would draw the dropout of its first steps again.
        seed = self.config.training.seed + self.steps_done
        return make_options(self.poptorch, self.stages, self.config, self.half, seed, training)

    def describe(self) -> str:
        precision = "float16" if self.half else "float32"
        replicas = f"{self.ipu.replication_factor} replicas of {len({stage.ipu for stage in self.stages})} IPUs"
        accumulation = f"{self.ipu.gradient_accumulation_steps} of them in each replica's step"
        process_of_all = f", process {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        return f"{precision}, {replicas}, micro-batches of {self.micro_batch_size} rows, {accumulation}{process_of_all}"

    def compile(self) -> None:
        """Compiles the training executable, into ipu.executable_cache_dir. Takes minutes; may be interrupted."""
        rows = self.steps_per_call * self.config.training.global_batch_size // self.world_size
        data = self.config.data
        layout = self.task.row_shape(data, samples_per_row(data, static=True)).layout(rows)
        # All is new: PopTorch takes no wrapper twice, and what an interrupt leaves may be half on the IPUs.
        wrapped = self.wrap()
        training = self.poptorch.trainingModel(wrapped.train(), options=self.options(True), optimizer=self.optimizer)
        training.compile(*self.tensors({name: np.zeros(*layout[name]) for name in self.inputs}))
        self.compiled_model, self.training = wrapped, training

    def tensors(self, rows: Arrays) -> List[torch.Tensor]:
        return [torch.from_numpy(rows[name]) for name in self.inputs]

    def expect_rows(self, rows: int) -> None:
        """Nothing: shapes are static."""

    def prepare(self) -> None:
        """Has the training executable on the IPUs, with the state that was loaded."""
        if is_attached(self.inference):
            self.inference.detachFromDevice()
        if self.training is None:
            self.compile()
        if not is_attached(self.training):
            self.training.attachToDevice()
        if self.loaded is not None:
            # Only now are the state's names known: a serialized weight has its state in parts.
            state = self.optimizer.state_dict()
            parameters = dict(self.model.named_parameters())
            state["ipu_state"] = write_state(self.config.optimizer.name, state["ipu_state"], self.loaded, parameters)
            self.optimizer.load_state_dict(state)  # the next setOptimizer sends it up
            self.loaded = None

    def step(
        self, batch: Arrays, learning_rate: float, step: int, progress: Callable[[int], None] = ignore_progress
    ) -> Dict[str, torch.Tensor]:
        """Metrics are means over the rows of this process, none with ipu.synthetic_data; PopART skips no update. It is
        not to be interrupted but while it compiles."""
        with cancellable():
            self.prepare()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.training.setOptimizer(self.optimizer)
        sums = self.training(*self.tensors(batch))[1:]
        self.steps_done = step
        progress(len(batch["input_ids"]))
        metrics = {
            name: total.float().sum() / float(batch[weights].sum(dtype=np.float64))
            for (name, weights), total in zip(self.task.metrics.items(), sums)
        }
        return {**({} if self.made_up else metrics), "skipped_updates": torch.tensor(0)}

    def evaluate(self, batch: Arrays) -> Dict[str, torch.Tensor]:
        """The IPUs go to another executable for it."""
        totals = dict.fromkeys(self.task.metrics, torch.zeros(()))
        for found in self.infer(batch):
            for name, total in zip(self.task.metrics, found[1:]):
                totals[name] = totals[name] + total.float().sum()
        return totals

    def predict(self, batch: Arrays) -> np.ndarray:
        task = self.task
        assert isinstance(task, ExampleTask)
        outputs = [found[-1].float().numpy() for found in self.infer(batch)]
        used = batch[task.output_slots].ravel() != 0
        return np.concatenate(outputs)[: len(used)][used]

    def infer(self, batch: Arrays) -> List[Any]:
        """What the inference executable gives of the rows, some at a time."""
        if is_attached(self.training):
            self.training.detachFromDevice()
        if self.compiled_model is None:
            self.compiled_model = self.wrap()
        self.compiled_model.eval()
        if self.inference is None:
            self.inference = self.poptorch.inferenceModel(self.compiled_model, options=self.options(False))
        elif not is_attached(self.inference):
            self.inference.attachToDevice()
        # As many micro-batches as the pipeline has stages; the last are filled up with rows of weight 0.
        count = self.micro_batch_size * len(self.stages) * self.ipu.replication_factor // self.world_size
        results = []
        for first in range(0, len(batch["input_ids"]), count):
            rows = {name: array[first : first + count] for name, array in batch.items()}
            results.append(self.inference(*self.tensors(add_empty_rows(rows, count - len(rows["input_ids"])))))
        self.compiled_model.train()
        return results

    def measure(self, batch: Arrays) -> Dict[str, float]:
        """Of the whole step, with a learning rate of 0: the executable has no parts that can be timed alone."""
        with cancellable():
            self.prepare()
        before = time.perf_counter()
        self.step(batch, 0.0, self.steps_done)
        return {"step": time.perf_counter() - before}

    def wait_for(self, step: int) -> None:
        """Nothing: a step is done when the call returns."""

    def weights(self) -> Dict[str, torch.Tensor]:
        if is_attached(self.training):
            self.training.copyWeightsToHostIfNeeded()
        return {name: parameter.detach().float().clone() for name, parameter in self.model.named_parameters()}

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])
        if is_attached(self.training):
            self.training.copyWeightsToDevice()

    def optimizer_state(self) -> Dict[str, torch.Tensor]:
        if self.loaded is not None:
            return self.loaded
        if self.training is None:
            return {}
        state, parameters = self.optimizer.state_dict()["ipu_state"], dict(self.model.named_parameters())
        return read_state(self.config.optimizer.name, state, parameters)

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor], skipped_updates: int) -> None:
        """None of the updates that were skipped so far concerns the IPU."""
        check_ipu_state(self.config.optimizer.name, tensors, dict(self.model.named_parameters()))
        self.loaded = dict(tensors)

    def skipped_updates(self) -> int:
        """0: PopART skips no update."""
        return 0


def is_attached(executor) -> bool:
    return executor is not None and executor.isAttachedToDevice()


def make_options(poptorch, stages: Sequence[Stage], config: Config, half: bool, seed: int, training: bool):
    """poptorch.Options for the training executable, or for one that evaluates."""
    ipu, processes = config.ipu, process_of("ipu")[1]
    if processes > 1:  # poprun says how many replicas there are
        options = importlib.import_module("popdist.poptorch").Options(
            ipus_per_replica=1 + max(stage.ipu for stage in stages)
        )
    else:
        options = poptorch.Options()
        options.replicationFactor(ipu.replication_factor)
    options.autoRoundNumIPUs(True)
    options.relaxOptimizerAttributesChecks(True)  # torch gives an optimizer whose state was loaded attributes more
    options.randomSeed(seed)
    options.outputMode(poptorch.OutputMode.Sum if training else poptorch.OutputMode.All)
    options.setExecutionStrategy(
        poptorch.PipelinedExecution(*(poptorch.Stage(*stage.blocks).ipu(stage.ipu) for stage in stages))
    )
    options.setAvailableMemoryProportion({f"IPU{stage.ipu}": stage.matmul_proportion for stage in stages})
    options.Precision.setPartialsType(torch.float16 if half and ipu.enable_half_partials else torch.float32)
    if config.ipu_model:  # it has no cache
        options.useIpuModel(True)
    else:
        options.enableExecutableCaching(ipu.executable_cache_dir)
    if config.compile_only:  # for IPUs like those that are here, else for Mk2
        version = poptorch.ipuHardwareVersion() if poptorch.ipuHardwareIsAvailable() else 2
        options.useOfflineIpuTarget(version if version > 0 else 2)
    if ipu.synthetic_data:
        options.enableSyntheticData(True)
    engine_options = {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"}
    if ipu.profile_folder:
        engine_options.update(
            {"autoReport.all": "true", "autoReport.directory": ipu.profile_folder, "debug.allowOutOfMemory": "true"}
        )
    options._Popart.setEngineOptions(engine_options)
    if training:
        set_training_options(options, poptorch, config, half, processes)
    else:
        options.deviceIterations(len(stages))  # enough to fill the pipeline
    return options


def set_training_options(options, poptorch, config: Config, half: bool, processes: int) -> None:
    popart, ipu = importlib.import_module("popart"), config.ipu
    options.deviceIterations(ipu.device_iterations)
    options.Training.gradientAccumulation(ipu.gradient_accumulation_steps)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    if ipu.automatic_loss_scaling:
        options.Training.setAutomaticLossScaling(True)
    options.Precision.enableStochasticRounding(half and ipu.stochastic_rounding)
    options.TensorLocations.setOptimizerLocation(
        poptorch.TensorLocationSettings()
        .useOnChipStorage(not ipu.optimizer_state_offchip)
        .useReplicatedTensorSharding(ipu.replicated_tensor_sharding and ipu.replication_factor > processes)
    )
    # Accumulators stay on the device, and weights are updated where that needs the least memory, IPU 0's tied embedding
    # apart.
    options._Popart.set("disableGradAccumulationTensorStreams", True)
    options._Popart.set(
        "accumulateOuterFragmentSettings.schedule", int(popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized)
    )
    options._Popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    options._Popart.set("subgraphCopyingStrategy", int(popart.SubgraphCopyingStrategy.JustInTime))
    options._Popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    # The embedding's gather and the decoder share one layout and one accumulator, and are cut into the same parts.
    # By PopART's source each part is updated alone, and LambSerialisedWeight adds up the squares of their norms, for
    # the trust ratio of all. Nobody has seen it in a compiled graph (docs/ipu.md).
    options._Popart.setPatterns(
        {
            "TiedGather": True,
            "TiedGatherAccumulate": True,
            "UpdateInplacePrioritiesForIpu": True,
            "LambSerialisedWeight": config.optimizer.trust_ratio_slices == 1,
        }
    )
