"""What trainingModel and inferenceModel return: compiles a module into a graph, and runs that graph as a device would.

The graph is traced once; a step replays it. So nothing that changes in the module afterwards reaches the device, and
weights are the device's own. A step of the host is cut, along the first dimension, into device iterations, replicas and
micro-batches.
"""

import hashlib
import logging
import math
import os
import pathlib
import random
import warnings
import weakref

import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.poptorch_contract.facts import ENUMS, from_facts
from tests.poptorch_contract.operators import Float32, Trace, Whole, check
from tests.poptorch_contract.optimizer import Optimizer, check_constants, updated
from tests.poptorch_contract.options import Options, PipelinedExecution, ShardedExecution
from tests.poptorch_contract.processes import add_up

__all__ = ["PoplarExecutor", "executors", "forget_executors", "ipus_available"]

_made = []  # weak references, in order
_wrapped = weakref.WeakSet()  # modules that a training executor has made its own
_INPUT_TYPES = (torch.float32, torch.float16, torch.int32, torch.bool, torch.uint8, torch.int8)


def executors():
    """The executors that are alive, in the order in which they were made."""
    return [executor for executor in (reference() for reference in _made) if executor is not None]


def forget_executors():
    """Begins anew: attached executors no longer hold IPUs."""
    _made.clear()
    _wrapped.clear()


def ipus_available() -> int:
    """How many IPUs there are: STAND_IN_IPUS, or 64."""
    return int(os.environ.get("STAND_IN_IPUS", 64))


@from_facts("executor", "PoplarExecutor")
class PoplarExecutor:
    """`trace` has the events of the compilation (operators.Event)."""

    def __init__(self, model, options, training, poptorch_version, optimizer, user_model):
        self._model, self._options, self._training = model, options if options is not None else Options(), training
        self._options._freeze()
        set_to = self._options.called.get
        self._iterations, self._replicas = set_to("deviceIterations", 1), set_to("replicationFactor", 1)
        self._accumulation = set_to("Training.gradientAccumulation", 1)
        if not training and self._accumulation != 1:
            raise RuntimeError(
                "an inferenceModel takes no Training.gradientAccumulation; deviceIterations fill its pipeline"
            )
        mode = set_to("outputMode", ENUMS["OutputMode"].Default)
        if self._options.defaultOutputMode():
            mode = ENUMS["OutputMode"].Final if training else ENUMS["OutputMode"].All
        self._output_mode, self._synthetic = mode, set_to("enableSyntheticData", False)
        self._offline = set_to("connectionType", ENUMS["ConnectionType"].Always) is ENUMS["ConnectionType"].Never
        self._mean = (
            set_to("Training.accumulationAndReplicationReductionType", ENUMS["ReductionType"].Mean)
            is ENUMS["ReductionType"].Mean
        )
        self._graph = self._optimizer = self._values = None
        self._attached = self._dirty = self._interrupted = False
        self._watched = {}
        self._steps, self._trace = 0, []
        self._number = sum(1 for executor in executors() if executor._training)
        if training:
            if model in _wrapped:
                raise RuntimeError(
                    "the model is wrapped in a trainingModel already: destroy() that one, if it was compiled, before "
                    "the model is wrapped again"
                )
            _wrapped.add(model)
            self.setOptimizer(optimizer)
        _made.append(weakref.ref(self))

    @property
    def model(self):
        return self._model

    @property
    def options(self):
        return self._options

    @property
    def trace(self):
        return self._trace

    def isCompiled(self):
        return self._graph is not None

    def isAttachedToDevice(self):
        return self._attached

    def setOptimizer(self, optimizer):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"the optimizer is poptorch.optim.LAMB or AdamW here, not {optimizer!r}")
        values = optimizer._values({id(parameter): name for name, parameter in self._model.named_parameters()})
        if self.isCompiled():
            check_constants(self._values, values)
        if optimizer is not self._optimizer:
            if self._optimizer is not None:
                self._optimizer.state_dict()
                self._optimizer._executor = None
            optimizer._executor, self._optimizer = weakref.ref(self), optimizer
            optimizer._is_loaded = self.isCompiled()
        self._values = values
        self._warn_of_new_attributes()
        self._write_loaded_state()

    def _warn_of_new_attributes(self):
        log = logging.getLogger("poptorch").warning
        if self._options.called.get("relaxOptimizerAttributesChecks"):
            log = logging.getLogger("poptorch").debug
        for kind, names in self._optimizer._attributes():
            new = names - self._watched.setdefault(kind, names)
            if new:
                log("Ignoring unexpected %s in %s optimizer: %s", kind, type(self._optimizer).__name__, sorted(new))

    def compile(self, *args, **kwargs):
        if self.isCompiled():
            warnings.warn("compile: the executor is compiled already, and stays as it is", stacklevel=2)
            return
        if self._interrupted:
            raise RuntimeError("compile: the compilation was interrupted, which leaves a wrapper of no use")
        try:
            self._compile(args, kwargs)
        except KeyboardInterrupt:
            self._interrupted = True
            raise

    def _compile(self, args, kwargs):
        inputs, self._structure = _flatten(args, kwargs)
        self._signature = [(tensor.shape, tensor.dtype) for tensor in inputs]
        names = [name for name, _ in self._model.named_parameters()]
        self._trained = [
            name for name, parameter in self._model.named_parameters() if self._training and parameter.requires_grad
        ]
        micro_batch = [self._cut(tensor)[0, 0, 0] for tensor in inputs]
        parameters, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        strategy = self._options.called.get("setExecutionStrategy", PipelinedExecution())
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self._training):
            trace, self._output_types = check(self._call, parameters, buffers, micro_batch, strategy, self._training)
            self._check_options(trace, strategy)
            weights = [
                tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
                for tensor in (*parameters.values(), *buffers.values())
            ]
            inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in micro_batch]
            graph = make_fx(self._step_of(names + list(buffers), strategy), tracing_mode="fake")(
                weights, torch.ones(()), inputs
            )
        # PopART updates a serialized weight part by part where micro-batches' gradients are accumulated; the pattern
        # adds up the squares of the parts' norms, so that all have the trust ratio of the whole.
        self._ipus, self._parts = self._round(trace.ipus), trace.parts if self._accumulation > 1 else {}
        patterns = self._options.called.get("_Popart.setPatterns", {})
        self._ratios = {} if patterns.get("LambSerialisedWeight", True) else self._parts
        if not self._offline:
            self._need_ipus()
        self._trace, self._graph = trace.events, graph
        self._cache()
        self._device = self._moments = None
        if not self._offline:
            self._attach()

    def __call__(self, *args, **kwargs):
        assert not self._offline, "useOfflineIpuTarget (ConnectionType.Never): an executor without IPUs only compiles"
        if not self.isCompiled():
            self.compile(*args, **kwargs)
        inputs, structure = _flatten(args, kwargs)
        signature = [(tensor.shape, tensor.dtype) for tensor in inputs]
        if (structure, signature) != (self._structure, self._signature):
            raise RuntimeError(f"the inputs are {signature}; the model was compiled for {self._signature}")
        if not self._attached:
            self.attachToDevice()
        if self._synthetic:
            inputs = [torch.zeros_like(tensor) for tensor in inputs]
        self._write_loaded_state()
        batches = [self._cut(tensor.float() if tensor.is_floating_point() else tensor) for tensor in inputs]
        outputs = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(self._generator)
            for iteration in range(self._iterations):
                self._iterate(iteration, batches, outputs)
            self._generator = torch.get_rng_state()
        self._dirty = self._training
        if self._training:
            self._optimizer._is_stale = True
        outputs = [self._collect(outputs, i, dtype) for i, dtype in enumerate(self._output_types)]
        return tree_unflatten(outputs, self._output_structure)

    def copyWeightsToHost(self):
        self._need_attached()
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(self._from_device(self._device[name]))
        self._dirty = False

    def copyWeightsToHostIfNeeded(self):
        if not self._dirty:
            return False
        self.copyWeightsToHost()
        return True

    def copyWeightsToDevice(self):
        self._need_attached()
        self._device = {name: tensor.detach().clone() for name, tensor in self._state().items()}
        self._dirty = False

    def load_state_dict(self, state_dict, strict):
        loaded = self._model.load_state_dict(state_dict, strict)
        if self._attached:
            self.copyWeightsToDevice()
        return loaded

    def detachFromDevice(self):
        self._need_attached()
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._optimizer.state_dict()
        self._attached = False

    def attachToDevice(self):
        self._need_compiled()
        assert not self._offline, "attachToDevice: the executor was compiled for no device (ConnectionType.Never)"
        if self._attached:
            raise RuntimeError("attachToDevice: the executor is attached already")
        self._need_ipus()
        self._attach()

    def destroy(self):
        if self.isCompiled():
            self.copyWeightsToHostIfNeeded()
            self._graph, self._attached = None, False
            if self._training:
                _wrapped.discard(self._model)

    # Tracing.

    def _call(self, state, inputs):
        args, kwargs = tree_unflatten(inputs, self._structure)
        return functional_call(self._model, state, args, kwargs)

    def _step_of(self, names, strategy):
        """(weights, loss scaling, inputs) -> outputs and the gradients of the loss times the loss scaling, all in
        float32."""

        def step(weights, loss_scaling, inputs):
            trace = Trace(strategy)
            state = {
                name: tensor.detach().requires_grad_(name in self._trained) for name, tensor in zip(names, weights)
            }
            with trace.open(), Float32():
                with Whole():
                    outputs, self._output_structure = tree_flatten(self._call(state, inputs))
                leaves = [state[name] for name in self._trained]
                gradients = (
                    torch.autograd.grad(trace.losses[0].sum(), leaves, loss_scaling, allow_unused=True)
                    if leaves
                    else ()
                )
            return [output.detach() for output in outputs], list(gradients)

        return step

    def _check_options(self, trace, strategy):
        called, stages = self._options.called, trace.stages
        if called.get("useIpuModel") and self._offline:
            raise RuntimeError("useOfflineIpuTarget (ConnectionType.Never) is not supported for the IPU model")
        if stages > 1 and not isinstance(strategy, ShardedExecution):
            name, number, needed = (
                ("Training.gradientAccumulation", self._accumulation, 2 * stages - 1)
                if self._training
                else ("deviceIterations", self._iterations, stages)
            )
            if number < needed:
                raise RuntimeError(f"{name} is {number}; a pipeline of {stages} stages needs at least {needed}")
        scaled = self._training and called.get("Training.setAutomaticLossScaling")
        if scaled and not (self._mean and self._optimizer.accum_type == torch.float16):
            raise RuntimeError("automatic loss scaling needs ReductionType.Mean and accum_type=torch.float16")
        if self._training:
            grouped = {name for group in self._values["groups"] for name in group["names"]}
            missing = sorted(set(self._trained) - grouped)
            if missing:
                raise ValueError(f"the optimizer has no group for {', '.join(missing)}")

    def _round(self, ipus):
        rounded = 2 ** math.ceil(math.log2(ipus))
        if ipus != rounded and not self._options.called.get("autoRoundNumIPUs", False):
            raise RuntimeError(f"the model takes {ipus} IPUs, no power of two: set autoRoundNumIPUs")
        return rounded * self._replicas

    def _cache(self):
        folder = self._options.called.get("enableExecutableCaching")
        if folder:
            digest = hashlib.sha256(repr((self._trace, self._signature)).encode()).hexdigest()
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            (pathlib.Path(folder) / (digest[:16] + ".popef")).write_text("an executable of the stand-in\n")

    # Running.

    def _cut(self, tensor):
        """[N, ...] -> [device iterations, replicas, accumulation, micro-batch, ...]"""
        parts = self._iterations * self._replicas * self._accumulation
        return tensor.reshape(
            self._iterations, self._replicas, self._accumulation, len(tensor) // parts, *tensor.shape[1:]
        )

    def _iterate(self, iteration, batches, outputs):
        weights = [tensor.float() if tensor.is_floating_point() else tensor for tensor in self._device.values()]
        loss_scaling = torch.tensor(self._values["loss_scaling"] if self._training else 1.0)
        accumulators, running = {}, self._mean and self._training and self._optimizer.accum_type == torch.float16
        for replica in range(self._replicas):
            for micro_batch in range(self._accumulation):
                done = replica * self._accumulation + micro_batch
                inputs = [batch[iteration, replica, micro_batch] for batch in batches]
                outputs[iteration, replica, micro_batch], gradients = self._graph(weights, loss_scaling, inputs)
                for name, gradient in zip(self._trained, gradients):
                    if gradient is not None:
                        before = accumulators.get(name, torch.zeros(()))
                        # In float16 PopTorch has PopART keep the mean so far, a sum in float32: that of many would run
                        # over.
                        total = (
                            before.float() + (gradient - before.float()) / (done + 1) if running else before + gradient
                        )
                        accumulators[name] = total.to(self._optimizer.accum_type)
        if self._training:
            self._update(accumulators, self._accumulation * self._replicas if self._mean and not running else 1)

    def _update(self, accumulators, parts):
        processes = self._options.Distributed.numProcesses
        parts *= processes if self._mean else 1
        gradients = {name: tensor.float() for name, tensor in accumulators.items()}
        if processes > 1:
            gradients = add_up(
                gradients, f"{self._number}-{self._steps}", self._options.Distributed.processId, processes
            )
        self._steps += 1
        for group in self._values["groups"]:
            for name in group["names"]:
                if name in gradients:
                    gradient = gradients[name] / (parts * self._values["loss_scaling"])
                    first, second, *steps = self._moments[name]
                    step = steps[0] if steps else None
                    slices = self._ratios.get(name, 1)
                    new = updated(self._device[name], gradient, first, second, step, group, slices)
                    for tensor, value in zip((self._device[name], first, second, *steps), new):
                        tensor.copy_(value)

    def _collect(self, outputs, i, dtype):
        """One output over the whole step, as the output mode says: [N], or concatenated along the first dimension."""
        modes = ENUMS["OutputMode"]
        values = {key: self._from_device(tensors[i]) for key, tensors in outputs.items()}
        if self._output_mode is modes.All:
            chosen = list(values.values())
        elif self._output_mode is modes.Final:
            last = (self._iterations - 1, self._accumulation - 1)
            chosen = [
                value for (iteration, _, micro_batch), value in values.items() if (iteration, micro_batch) == last
            ]
        elif self._output_mode is modes.Sum:
            chosen = [
                sum(value for key, value in values.items() if key[1] == replica) for replica in range(self._replicas)
            ]
        else:  # EveryN
            period = self._options.called["outputReturnPeriod"]
            chosen = [
                value
                for (iteration, _, micro_batch), value in values.items()
                if (iteration * self._accumulation + micro_batch + 1) % period == 0
            ]
        return (torch.cat(chosen) if chosen[0].dim() else torch.stack(chosen)).to(dtype)

    # The device's weights and state.

    def _from_device(self, tensor):
        """What comes back to the host: with synthetic data nothing, so that the memory for it is uninitialised."""
        if not self._synthetic:
            return tensor
        return torch.full_like(tensor, math.nan if tensor.is_floating_point() else -12345)

    def _need_compiled(self):
        if not self.isCompiled():
            raise RuntimeError("the model has not been compiled, or has been destroyed")

    def _need_attached(self):
        self._need_compiled()
        if not self._attached:
            raise RuntimeError("the executor is not attached to IPUs")

    def _need_ipus(self):
        attached = sum(executor._ipus for executor in executors() if executor._attached)
        if not self._options.called.get("useIpuModel", False) and attached + self._ipus > ipus_available():
            raise RuntimeError(
                f"{self._ipus} IPUs are wanted, {attached} are attached to executors, and there are {ipus_available()}"
            )

    def _state(self):
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _attach(self):
        self._attached = True
        seed = self._options.called.get("randomSeed", random.randrange(2**32))
        self._generator = torch.Generator().manual_seed(seed + self._options.Distributed.processId).get_state()
        self.copyWeightsToDevice()
        if self._training:
            self._write_state()

    def _write_loaded_state(self):
        if self._training and self._attached and self._optimizer._is_loaded:
            self._write_state()

    def _write_state(self):
        types = (self._optimizer.first_order_momentum_accum_type, self._optimizer.second_order_momentum_accum_type)
        if self._moments is None:
            self._moments = {
                name: [torch.zeros_like(self._device[name], dtype=dtype) for dtype in types]
                + [torch.zeros(())] * self._optimizer.bias_correction
                for name in self._trained
            }
        self._optimizer._is_loaded = False
        if not self._optimizer.has_state():
            self._optimizer._is_stale = True
            return
        state = dict(self._optimizer.get_state_dict()["ipu_state"])
        for key, tensor in self._tensors().items():
            loaded = state.pop(key, None)
            if loaded is None:
                warnings.warn(f"the optimizer's state has no {key}: the device keeps its own", stacklevel=2)
                continue
            # They are read through a raw pointer.
            if (loaded.dtype, loaded.shape) != (tensor.dtype, tensor.shape) or not loaded.is_contiguous():
                raise RuntimeError(
                    f"{key} has to be a contiguous {tensor.dtype} of shape {tuple(tensor.shape)}, not "
                    f"{loaded.dtype} of shape {tuple(loaded.shape)} and strides {loaded.stride()}"
                )
            tensor.copy_(loaded)
        for key in state:
            warnings.warn(f"the optimizer's state has {key}, which the device has not", stacklevel=2)

    def _tensors(self):
        tensors = {}
        for name, moments in self._moments.items():
            for prefix, moment in zip(("Accl1___", "Accl2___", "Step___"), moments):
                parts = self._parts.get(name, 1)
                if parts == 1:
                    tensors[prefix + "model." + name] = moment
                    continue
                # PopART names the state of a serialized weight after the parts of its product.
                for i, part in enumerate(moment.chunk(parts) if moment.dim() else [moment] * parts):
                    number = f"/{i}" if i else ""
                    tensors[f"{prefix}MatMul:MatMulRhsGradOp_Slice:0{number}"] = part
        return tensors

    def _read_state(self):
        self._need_compiled()
        return {
            "ipu_state": {key: self._from_device(tensor).clone() for key, tensor in self._tensors().items()},
            "ipu_param": {"lossScaling_FLOAT": torch.tensor(self._values["loss_scaling"])},
        }


def _flatten(args, kwargs):
    if kwargs:
        raise TypeError(f"an executor takes its inputs by position, not {', '.join(kwargs)}")
    inputs, structure = tree_flatten((args, kwargs))
    flat = [tensor for arg in args for tensor in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if not inputs or len(flat) != len(inputs) or not all(isinstance(tensor, torch.Tensor) for tensor in flat):
        raise TypeError("an executor takes tensors, or a flat tuple of them")
    for tensor in inputs:
        if tensor.dtype not in _INPUT_TYPES:
            raise TypeError(f"an input is {tensor.dtype}; an IPU takes int32, float32, float16 and bool")
    if len({tensor.shape[:1] for tensor in inputs}) != 1 or not inputs[0].dim():
        shapes = [tuple(tensor.shape) for tensor in inputs]
        raise RuntimeError(f"the inputs need the same first dimension; their shapes are {shapes}")
    return [tensor.detach() for tensor in inputs], structure
