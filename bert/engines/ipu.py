"""The engine for IPUs, through PopTorch: a step is one call of the compiled executable.

Shape letters: R rows, L tokens of a row, M mask slots of a row, S samples of a row.
"""

import importlib
import importlib.util
import re
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from bert.config import IpuConfig
from bert.model.stages import Stage
from bert.signals import cancellable
from data.errors import InputError
from ops.ipu import lowering
from ops.lamb import lamb_groups

__all__ = ["IpuEngine", "IpuModel", "METRICS", "make_options", "process"]

INPUTS = (
    "input_ids",
    "token_type_ids",
    "position_ids",
    "sample_ids",
    "mlm_positions",
    "mlm_labels",
    "mlm_weights",
    "cls_positions",
    "nsp_labels",
    "nsp_weights",
)
# Each metric of the graph, and the weights that it is a sum over.
METRICS = {
    "mlm_loss": "mlm_weights",
    "nsp_loss": "nsp_weights",
    "mlm_accuracy": "mlm_weights",
    "nsp_accuracy": "nsp_weights",
}
MOMENTS = {"exp_avg": "Accl1___", "exp_avg_sq": "Accl2___"}  # PopART's prefixes of the optimizer's state


def process() -> Tuple[int, int]:
    """(index, number) of this process among those that poprun started; (0, 1) without it."""
    if importlib.util.find_spec("popdist") is None:
        return 0, 1
    popdist = importlib.import_module("popdist")
    return (popdist.getInstanceIndex(), popdist.getNumInstances()) if popdist.isPopdistEnvSet() else (0, 1)


class IpuModel(nn.Module):
    """What PopTorch compiles: the tensors of a micro-batch of rows (data/rows.py) -> the loss and the graph's metrics,
    scalars.

    In training the loss that is differentiated is `micro_batches` times the graph's: PopTorch takes the mean over so
    many micro-batches, whose weights sum to 1 over all of them. So each has a loss of the usual size, which float16
    needs.
    """

    def __init__(self, graph: nn.Module, poptorch, micro_batches: int, proportions: Dict[str, float]):
        super().__init__()
        self.graph, self.poptorch, self.micro_batches, self.proportions = graph, poptorch, micro_batches, proportions

    def forward(
        self,
        input_ids,
        token_type_ids,
        position_ids,
        sample_ids,
        mlm_positions,
        mlm_labels,
        mlm_weights,
        cls_positions,
        nsp_labels,
        nsp_weights,
    ):
        batch = dict(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            sample_ids=sample_ids,
            mlm_positions=mlm_positions,
            mlm_labels=mlm_labels,
            mlm_weights=mlm_weights,
            cls_positions=cls_positions,
            nsp_labels=nsp_labels,
            nsp_weights=nsp_weights,
        )
        with lowering(self.poptorch, self.micro_batches, self.proportions):
            loss, metrics = self.graph(batch)
        return (loss,) + tuple(metrics[name] for name in METRICS)


class IpuEngine:
    """Trains `graph` (batch of rows -> weighted loss, metrics) with LAMB on a pipeline of IPUs, in
    `ipu.replication_factor` replicas.

    `layout` gives the shape and type of each array of a global batch, all processes together (data/rows.py:
    RowShape.layout); `precision` is "auto" for float16 or "float32". Under poprun each process feeds its share of the
    rows, and its metrics are those of its share: `index` says which it is. A call does `steps_per_call` optimizer
    steps, on as many global batches one after the other.
    """

    asynchronous = False

    def __init__(
        self,
        graph: nn.Module,
        stages: Sequence[Stage],
        ipu: IpuConfig,
        layout: Dict[str, tuple],
        weight_decay: float,
        betas,
        eps: float,
        seed: int,
        precision: str = "auto",
        compile_only: bool = False,
        ipu_model: bool = False,
    ):
        self.poptorch = importlib.import_module("poptorch")
        self.graph, self.ipu, self.layout, self.stages, self.seed = graph, ipu, layout, stages, seed
        self.micro_batch_size, self.steps_per_call, self.steps_done = ipu.micro_batch_size, ipu.device_iterations, 0
        self.index, self.processes = process()
        if self.processes > 1:
            self.check_poprun(compile_only)
        self.half = precision != "float32"
        if self.half:
            graph.half()
        self.model = IpuModel(
            graph, self.poptorch, ipu.gradient_accumulation_steps * ipu.replication_factor, ipu.operation_proportions
        )
        self.optimizer = self.make_optimizer(weight_decay, betas, eps)
        self.compile_only, self.ipu_model = compile_only, ipu_model
        self.training, self.inference, self.moments = None, None, None

    def check_poprun(self, compile_only: bool) -> None:
        """Starts PopDist. Raises InputError where poprun was told something else than the config."""
        popdist = importlib.import_module("popdist")
        popdist.init()
        if compile_only:
            raise InputError(
                f"--compile-only compiles for one process, and poprun started {self.processes}: leave it out; "
                "the first run under poprun compiles"
            )
        if popdist.getNumTotalReplicas() != self.ipu.replication_factor:
            raise InputError(
                f"ipu.replication_factor is {self.ipu.replication_factor}, and poprun started "
                f"{popdist.getNumTotalReplicas()} replicas: poprun --num-replicas "
                f"{self.ipu.replication_factor} ..., or a config for as many"
            )

    def options(self, training: bool):
        # Another seed where a run goes on: it would draw the dropout of its first steps again.
        return make_options(
            self.poptorch,
            self.stages,
            self.ipu,
            self.half,
            self.seed + self.steps_done,
            training,
            self.compile_only,
            self.ipu_model,
        )

    def make_optimizer(self, weight_decay: float, betas, eps: float):
        groups = []
        for group in lamb_groups(self.graph.named_parameters(), weight_decay):
            groups.append({"params": group["params"], "weight_decay": group["weight_decay"]})
            if not group["trust_ratio"]:
                groups[-1]["max_weight_norm"] = 0.0  # PopART's ratio is then 1
        half = torch.float16 if self.half else torch.float32
        optimizer = self.poptorch.optim.LAMB(
            groups,
            lr=0.0,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=False,
            loss_scaling=self.ipu.loss_scaling if self.half else 1.0,
            accum_type=half,
            first_order_momentum_accum_type=half if self.ipu.enable_half_first_order_momentum else torch.float32,
            second_order_momentum_accum_type=torch.float32,
        )
        for name in ("weight_decay", "max_weight_norm"):
            optimizer.variable_attrs.markAsConstant(name)
        return optimizer

    def describe(self) -> str:
        """One line for people: precision, replicas, micro-batches."""
        return "%s, %d replicas of %d IPUs, micro-batches of %d rows, %d of them in each replica's step%s" % (
            "float16" if self.half else "float32",
            self.ipu.replication_factor,
            len({stage.ipu for stage in self.stages}),
            self.micro_batch_size,
            self.ipu.gradient_accumulation_steps,
            ", process %d of %d" % (self.index, self.processes) if self.processes > 1 else "",
        )

    def compile(self) -> None:
        """Compiles the training executable, into ipu.executable_cache_dir. Takes minutes; may be interrupted."""
        self.training = self.poptorch.trainingModel(
            self.model.train(), options=self.options(True), optimizer=self.optimizer
        )
        rows = self.steps_per_call * self.layout["input_ids"][0][0] // self.processes
        empty = {name: np.zeros((rows,) + shape[1:], dtype) for name, (shape, dtype) in self.layout.items()}
        self.training.compile(*(torch.from_numpy(empty[name]) for name in INPUTS))

    def prepare(self) -> None:
        """Has the training executable on the IPUs, with the state that was loaded."""
        if is_attached(self.inference):
            self.inference.detachFromDevice()
        if self.training is None or not self.training.isCompiled():
            self.compile()
        if self.moments is not None:
            # Only now are the state's names known: a serialized weight has its moments in parts. PopTorch sends them up
            # when it attaches.
            if is_attached(self.training):
                self.training.detachFromDevice()
            state = self.optimizer.state_dict()
            state["ipu_state"] = write_moments(state["ipu_state"], self.moments, dict(self.graph.named_parameters()))
            self.optimizer.load_state_dict(state)
            self.moments = None
        if not is_attached(self.training):
            self.training.attachToDevice()

    def step(
        self,
        batch: Dict[str, np.ndarray],
        learning_rate: float,
        step: int,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Dict[str, torch.Tensor]:
        """`steps_per_call` optimizer steps, the last of which is `step`, on as many global batches of rows; then calls
        `progress(rows)`.

        Returns mlm_loss, nsp_loss, mlm_accuracy and nsp_accuracy, means over the rows of this process, and
        skipped_updates, which is 0: PopART skips none. Not to be interrupted but while it compiles.
        """
        with cancellable():
            self.prepare()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.training.setOptimizer(self.optimizer)
        share = self.share(batch)
        sums = self.training(*(torch.from_numpy(share[name]) for name in INPUTS))[1:]
        self.steps_done = step
        progress(len(batch["input_ids"]))
        metrics = {
            name: total.float().sum() / float(share[weights].sum(dtype=np.float64))
            for (name, weights), total in zip(METRICS.items(), sums)
        }
        metrics["skipped_updates"] = torch.tensor(0)
        return metrics

    def share(self, batch: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        # Of each of the call's global batches the same part, without a copy where there is one batch.
        if self.processes == 1:
            return batch
        parts = {}
        for name, array in batch.items():
            mine = array.reshape((self.steps_per_call, self.processes, -1) + array.shape[1:])[:, self.index]
            parts[name] = mine.reshape((-1,) + array.shape[1:])
        return parts

    def evaluate(self, batch: Dict[str, np.ndarray]) -> Dict[str, torch.Tensor]:
        """The metrics of `step` on these rows, without dropout and without an update. The IPUs go to another executable
        for it."""
        if is_attached(self.training):
            self.training.detachFromDevice()
        self.model.eval()
        if self.inference is None:
            self.inference = self.poptorch.inferenceModel(self.model, options=self.options(False))
        elif not is_attached(self.inference):
            self.inference.attachToDevice()
        # As many micro-batches as the pipeline has stages; the last are filled up with rows of weight 0.
        rows = self.micro_batch_size * len(self.stages) * self.ipu.replication_factor // self.processes
        totals = dict.fromkeys(METRICS, torch.zeros(()))
        for first in range(0, len(batch["input_ids"]), rows):
            part = {name: array[first : first + rows] for name, array in batch.items()}
            missing = rows - len(part["input_ids"])
            part = {
                name: np.concatenate([array, np.zeros((missing, array.shape[1]), array.dtype)])
                for name, array in part.items()
            }
            for name, total in zip(METRICS, self.inference(*(torch.from_numpy(part[name]) for name in INPUTS))[1:]):
                totals[name] = totals[name] + total.float().sum()
        self.model.train()
        return totals

    def wait_for(self, step: int) -> None:
        """Nothing: a step is done when the call returns."""

    def weights(self) -> Dict[str, torch.Tensor]:
        """Parameter name -> tensor, on the CPU, float32."""
        if is_attached(self.training):
            self.training.copyWeightsToHostIfNeeded()
        return {name: parameter.detach().float().clone() for name, parameter in self.graph.named_parameters()}

    def load_weights(self, tensors: Dict[str, torch.Tensor]) -> None:
        """Takes what `weights` gives; the names must be the graph's."""
        with torch.no_grad():
            for name, parameter in self.graph.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])
        if is_attached(self.training):
            self.training.copyWeightsToDevice()

    def optimizer_state(self) -> Dict[str, torch.Tensor]:
        """ "<parameter name>.exp_avg" and ".exp_avg_sq" -> tensor, on the CPU, float32; empty before the first step."""
        if self.moments is not None:
            return self.moments
        if self.training is None or not self.training.isCompiled():
            return {}
        return read_moments(self.optimizer.state_dict()["ipu_state"], dict(self.graph.named_parameters()))

    def load_optimizer_state(self, tensors: Dict[str, torch.Tensor], skipped_updates: int = 0) -> None:
        """Takes what `optimizer_state` gives; none of the updates counted so far concerns the IPU."""
        self.moments = dict(tensors)

    def skipped_updates(self) -> int:
        """0: PopART skips no update."""
        return 0


def is_attached(executor) -> bool:
    return executor is not None and executor.isAttachedToDevice()


def make_options(
    poptorch,
    stages: Sequence[Stage],
    ipu: IpuConfig,
    half: bool,
    seed: int,
    training: bool,
    compile_only: bool,
    ipu_model: bool,
):
    """poptorch.Options for the training executable, or for one that evaluates."""
    popart = importlib.import_module("popart")
    index, processes = process()
    if processes > 1:  # poprun says how many replicas there are
        options = importlib.import_module("popdist.poptorch").Options(
            ipus_per_replica=1 + max(stage.ipu for stage in stages)
        )
    else:
        options = poptorch.Options()
        options.replicationFactor(ipu.replication_factor)
    options.autoRoundNumIPUs(True)
    options.randomSeed(seed)
    options.outputMode(poptorch.OutputMode.Sum)
    options.setExecutionStrategy(
        poptorch.PipelinedExecution(*(poptorch.Stage(*stage.blocks).ipu(stage.ipu) for stage in stages))
    )
    options.setAvailableMemoryProportion({f"IPU{stage.ipu}": stage.matmul_proportion for stage in stages})
    options.Precision.setPartialsType(torch.float16 if half and ipu.enable_half_partials else torch.float32)
    if ipu_model:  # it has no cache
        options.useIpuModel(True)
    else:
        options.enableExecutableCaching(ipu.executable_cache_dir)
    if compile_only:  # for IPUs like those that are here, else for Mk2
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
    if not training:
        options.deviceIterations(len(stages))  # enough to fill the pipeline
        return options
    options.deviceIterations(ipu.device_iterations)
    options.Training.gradientAccumulation(ipu.gradient_accumulation_steps)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    if ipu.automatic_loss_scaling:
        options.Training.setAutomaticLossScaling(True)
    options.Precision.enableStochasticRounding(half and ipu.stochastic_rounding)
    options.TensorLocations.setOptimizerLocation(
        poptorch.TensorLocationSettings()
        .useOnChipStorage(not ipu.optimizer_state_offchip)
        .useReplicatedTensorSharding(ipu.replicated_tensor_sharding and ipu.replication_factor > 1)
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
    options._Popart.setPatterns(
        {"TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True}
    )
    return options


def read_moments(state: Dict[str, torch.Tensor], parameters: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """PopART's optimizer state -> {"<parameter name>.exp_avg", ".exp_avg_sq": float32 tensor of the parameter's
    shape}."""
    moments = {}
    for key, prefix in MOMENTS.items():
        for name, (keys, transposed) in parts_of(state, prefix, parameters).items():
            parts = [state[one].float().t() if transposed else state[one].float() for one in keys]
            moments[f"{name}.{key}"] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    return moments


def write_moments(
    state: Dict[str, torch.Tensor], moments: Dict[str, torch.Tensor], parameters: Dict[str, torch.Tensor]
) -> Dict:
    """`state` with the values of `moments`, each in the shape and type that PopART has: it reads them by their
    address."""
    written = dict(state)
    for key, prefix in MOMENTS.items():
        for name, (keys, transposed) in parts_of(state, prefix, parameters).items():
            moment = moments[f"{name}.{key}"]
            for one, part in zip(keys, moment.chunk(len(keys)) if len(keys) > 1 else [moment]):
                written[one] = (part.t() if transposed else part).to(state[one].dtype).contiguous()
    return written


def parts_of(
    state: Dict[str, torch.Tensor], prefix: str, parameters: Dict[str, torch.Tensor]
) -> Dict[str, Tuple[List[str], bool]]:
    """Parameter name -> (the state's names of its moment, whether those tensors are transposed).

    The one weight whose product is serialized has its moment in parts, "<product>", "<product>/1", "<product>/2" and so
    on, which are rows of it or, as the product takes them, columns. Raises InputError for anything else, rather than
    guess.
    """
    there = [key for key in state if key.startswith(prefix)]
    found = {name: [key for key in there if key.endswith("." + name)] for name in parameters}
    known = {key for keys in found.values() for key in keys}
    parts, missing = [key for key in there if key not in known], [name for name, keys in found.items() if not keys]
    if len(missing) == 1:
        products = {re.sub(r"/\d+$", "", key) for key in parts}
        found[missing[0]] = [product + (f"/{i}" if i else "") for product in products for i in range(len(parts))]
    placed = {
        name: (keys, orientation([state.get(key) for key in keys], parameters[name].shape))
        for name, keys in found.items()
    }
    if len(missing) > 1 or (parts and not missing) or any(transposed is None for _, transposed in placed.values()):
        wrong = missing or [name for name, (_, transposed) in placed.items() if transposed is None] or ["no parameter"]
        raise InputError(
            "the optimizer's state on the IPU has %s for %s, expected one tensor for each parameter, or equal parts of one "
            "serialized weight. Please report it with the versions of PopTorch and of the Poplar SDK; "
            "ipu.embedding_serialization_factor 1 avoids it"
            % (
                ", ".join("%s %s" % (key, list(state[key].shape)) for key in parts or found[wrong[0]]) or "nothing",
                ", ".join(wrong),
            )
        )
    return placed


def orientation(parts: List[Optional[torch.Tensor]], shape: torch.Size) -> Optional[bool]:
    """Whether these tensors, row after row, are transposed to make one of `shape`; None where they make none, or it is
    open."""
    if not parts or any(part is None or part.shape != parts[0].shape for part in parts):
        return None
    if len(parts) == 1:
        return False if parts[0].shape == shape else None
    rows, columns = shape[0] / len(parts), shape[1]
    fits = [parts[0].shape == (rows, columns), parts[0].shape == (columns, rows)]
    return fits[1] if sum(fits) == 1 else None
