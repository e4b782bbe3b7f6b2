"""One trace of a module as PopTorch makes it: blocks, annotations, and a check of every operator that reaches the
dispatcher."""

import contextlib
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.poptorch_contract.facts import ENUMS, FACTS, from_facts, function

__all__ = ["Attribute", "Block", "Event", "FUNCTIONS", "Float32", "Trace", "Whole", "check"]

# `_to_copy` is `to` below autograd; `prim` and the like only ask for properties of a tensor.
_HANDLED = set(FACTS["aten_ops_handled"]) | {name.split(".")[0] for name in FACTS["aten_ops_whole"]} | {"_to_copy"}
_WHOLE = {name.split(".")[0] for name in FACTS["aten_ops_whole"]} - {"item", "_local_scalar_dense"}
# Read a tensor's value on the host while tracing, or lower to nothing.
_REFUSED = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "scaled_dot_product_attention"}
_PRODUCT_NAMES = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"}


class Event(NamedTuple):
    """An operator (`mm`, ...) with its first output's shape and type, or an annotation (`poptorch.nop`, ...) with its
    arguments."""

    name: str
    block: str
    ipu: int
    shape: Optional[Tuple[int, ...]] = None
    dtype: Optional[torch.dtype] = None
    arguments: Optional[Dict[str, Any]] = None


class Trace:
    """What one trace of a module has met: its events, the stages in order of their visits, and the marked loss."""

    current: Optional["Trace"] = None

    def __init__(self, strategy):
        self.events: List[Event] = []
        self.strategy, self.block, self.ipu, self.inside = strategy, None, None, 0
        self.visits: List[Tuple[int, int]] = []  # (stage, IPU)
        self.losses: List[torch.Tensor] = []
        self.inputs: List[torch.Tensor] = []
        self.places: Dict[int, Set[int]] = {}  # number of an input -> the IPUs whose operators take it
        self.serialized: List[Tuple[torch.Tensor, int]] = []  # weights cut into rows, and how many parts

    @contextlib.contextmanager
    def open(self):
        Trace.current = self
        try:
            yield self
        finally:
            Trace.current = None

    @contextlib.contextmanager
    def whole(self):
        """Within, operators are the parts of one that PopTorch takes whole."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def enter(self, block, ipu):
        if self.block is not None:
            raise RuntimeError(f"block {block!r} is opened inside block {self.block!r}")
        stage, ipu = self.strategy._stage(block, ipu)
        last = self.visits[-1][0] if self.visits else -1
        if stage != last:
            if stage < last or (self.strategy._count is not None and stage != last + 1):
                raise RuntimeError(
                    f"block {block!r} of stage {stage} is opened after stage {last}: stages run in their order"
                )
            self.visits.append((stage, ipu))
        elif ipu != self.visits[-1][1]:
            raise RuntimeError(f"block {block!r} is on IPU {ipu}, its stage {stage} on IPU {self.visits[-1][1]}")
        self.block, self.ipu = block, ipu

    def leave(self):
        self.block = self.ipu = None

    def record(self, name, output=None, arguments=None):
        if self.block is None:
            raise RuntimeError(f"{name} is outside of every block: PopTorch would put it on a device of its choice")
        shape, dtype = (None, None) if output is None else (tuple(output.shape), output.dtype)
        self.events.append(Event(name, self.block, self.ipu, shape, dtype, arguments))

    def close(self, training):
        """Raises where the module as a whole is not one that PopTorch compiles."""
        count = self.strategy._count
        if count is not None and len(self.visits) != count:
            raise RuntimeError(f"the strategy has {count} stages, the module's blocks visit {len(self.visits)}")
        if training and len(self.losses) != 1:
            raise RuntimeError(f"identity_loss marks the loss once; the module calls it {len(self.losses)} times")
        for number, ipus in self.places.items():
            if len(ipus) > 1:
                raise RuntimeError(
                    f"input {number} is taken by operators on IPUs {' and '.join(map(str, sorted(ipus)))}: a "
                    "pipeline streams an input to one IPU"
                )

    @property
    def stages(self) -> int:
        """The pipeline's depth: consecutive stages on one IPU are one."""
        ipus = [ipu for _, ipu in self.visits]
        return sum(1 for i, ipu in enumerate(ipus) if i == 0 or ipu != ipus[i - 1])

    @property
    def ipus(self) -> int:
        return 1 + max((ipu for _, ipu in self.visits), default=0)


@from_facts("classes")
class Block(torch.nn.Module):
    def __init__(self, user_id, ipu_id):
        super().__init__()
        self._user_id, self._ipu_id = user_id, ipu_id

    def __enter__(self):
        if Trace.current is not None:
            Trace.current.enter(self._user_id, self._ipu_id)
        return self

    def __exit__(self, *_):
        if Trace.current is not None:
            Trace.current.leave()


@from_facts("options")
class Attribute:
    def __init__(self, **kwargs):
        self._attributes = kwargs

    def __enter__(self):
        _annotate("Attribute", **self._attributes)

    def __exit__(self, *_):
        pass


def _annotate(name, **arguments):
    if Trace.current is None:
        raise RuntimeError(f"poptorch.{name} is for a module that PopTorch traces")
    Trace.current.record("poptorch." + name, arguments=arguments)


def _recomputation_checkpoint(*tensors):
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise TypeError(f"poptorch.recomputationCheckpoint takes tensors, not {tensors!r}")
    _annotate("recomputationCheckpoint", shapes=[tuple(tensor.shape) for tensor in tensors])
    return tensors[0] if len(tensors) == 1 else tensors


def _serialized_matmul(lhs, rhs, mode, factor, keep_precision):
    modes = ENUMS["MatMulSerializationMode"]
    if mode is not modes.Disabled:
        size = {
            modes.InputChannels: lhs.shape[-2],
            modes.ReducingDim: lhs.shape[-1],
            modes.OutputChannels: rhs.shape[-1],
        }[mode]
        if factor < 1 or size % factor:
            raise ValueError(f"poptorch.serializedMatMul: factor {factor} does not divide the {size} of {mode.name}")
    if mode is modes.ReducingDim and torch.is_grad_enabled():
        raise NotImplementedError("serializedMatMul by ReducingDim in training: no model of its weight in parts")
    _annotate("serializedMatMul", mode=mode, factor=factor, keep_precision=keep_precision)
    if mode is modes.OutputChannels:
        Trace.current.serialized.append((rhs if rhs._base is None else rhs._base, factor))
    return torch.matmul(lhs, rhs)


def _set_available_memory(tensor, available_memory_proportion):
    # Of an operation that has no such setting it is the identity, and PopTorch passes on any number.
    _annotate("set_available_memory", available_memory_proportion=available_memory_proportion)
    return tensor


def _identity_loss(x, reduction):
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'poptorch.identity_loss: reduction is "none", "sum" or "mean", not {reduction!r}')
    _annotate("identity_loss", reduction=reduction)
    with Trace.current.whole():
        loss = x if reduction == "none" else getattr(x, reduction)()
    if loss.numel() != 1:
        raise RuntimeError(f"poptorch.identity_loss: the loss is a scalar; this one has shape {tuple(loss.shape)}")
    Trace.current.losses.append(loss)
    return loss


def _nop(tensor):
    _annotate("nop")
    return tensor


FUNCTIONS = {
    name: function("poptorch", name, FACTS["functions"][name], model)
    for name, model in (
        ("recomputationCheckpoint", _recomputation_checkpoint),
        ("serializedMatMul", _serialized_matmul),
        ("set_available_memory", _set_available_memory),
        ("identity_loss", _identity_loss),
        ("nop", _nop),
    )
}


class Whole(TorchFunctionMode):
    """Operators that PopTorch catches before PyTorch decomposes them: what they are made of is not looked at."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        trace = Trace.current
        if name in _REFUSED:
            raise RuntimeError(f"{name} is not lowered by PopTorch")
        if name not in _WHOLE or trace.inside:
            return func(*args, **kwargs)
        with trace.whole():
            output = _one_hot(*args, **kwargs) if name == "one_hot" else func(*args, **kwargs)
        trace.record(
            name, next((tensor for tensor in tree_flatten(output)[0] if isinstance(tensor, torch.Tensor)), None)
        )
        return output


def _one_hot(tensor, num_classes=-1):
    # PyTorch's reads the tensor's values on the host.
    if num_classes < 1:
        raise RuntimeError("one_hot without num_classes has a shape that depends on values")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


class _Checked(TorchDispatchMode):
    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace != "prim" and not self.trace.inside and not (name in _HANDLED or name.rstrip("_") in _HANDLED):
            raise RuntimeError(f"{namespace}::{name} is not lowered by PopTorch (in block {self.trace.block!r})")
        for number, tensor in enumerate(self.trace.inputs):
            if self.trace.block is not None and any(argument is tensor for argument in tree_flatten((args, kwargs))[0]):
                self.trace.places.setdefault(number, set()).add(self.trace.ipu)
        if name in _PRODUCT_NAMES:
            types = {tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor)}
            if len(types) > 1:
                raise RuntimeError(f"{namespace}::{name} of several types, {', '.join(sorted(map(str, types)))}")
        try:
            output = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuntimeError(f"{namespace}::{name}: a shape or a branch would depend on values") from error
        tensors = [tensor for tensor in tree_flatten(output)[0] if isinstance(tensor, torch.Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            raise RuntimeError(f"{namespace}::{name} gives float64, which the IPU does not have")
        if namespace != "prim" and not self.trace.inside:
            self.trace.record(name, tensors[0] if tensors else None)
        return output


class Float32(TorchDispatchMode):
    """Within, what asks for float16 gets float32: a CPU has few kernels for float16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(
            *args, **{key: torch.float32 if value is torch.float16 else value for key, value in (kwargs or {}).items()}
        )


def check(call, parameters: Dict[str, torch.Tensor], buffers, inputs, strategy, training: bool):
    """Traces `call(parameters and buffers, inputs)` on tensors without values, of the types that they have.

    Returns the trace and the types of the outputs. Raises for what PopTorch would refuse.
    """
    trace, fake = Trace(strategy), FakeTensorMode()
    state = {
        name: fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        for name, tensor in parameters.items()
    }
    state.update((name, fake.from_tensor(tensor.detach())) for name, tensor in buffers.items())
    trace.inputs = inputs = [fake.from_tensor(tensor) for tensor in inputs]
    with trace.open(), fake, _Checked(trace), Whole():
        outputs = call(state, inputs)
    trace.close(training)
    trace.parts = {
        name: factor for weight, factor in trace.serialized for name, tensor in state.items() if tensor is weight
    }
    if training:
        _refuse_own_backward(trace.losses[0])
    outputs = tree_flatten(outputs)[0]
    if not outputs or not all(isinstance(output, torch.Tensor) for output in outputs):
        raise RuntimeError("the module's outputs have to be tensors, or tuples and lists of them")
    return trace, [torch.int32 if output.dtype == torch.int64 else output.dtype for output in outputs]


def _refuse_own_backward(loss):
    # PopART differentiates its graph itself: a backward written in Python would be ignored.
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            raise RuntimeError(
                f"{node.name()}: PopTorch takes no torch.autograd.Function, it differentiates the graph itself"
            )
        nodes.extend(following for following, _ in node.next_functions)
