"""What the model of a config does with one micro-batch on IPUs. It is read off the model itself, which runs once on
tensors that have no memory.

The model takes the forms that PopTorch lowers, and passes its annotations to the tracer (ops/ipu.py). Each operation
that makes a new tensor is recorded: its block, its inputs, which tensors its gradient needs, and the work of matrix
products.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bert.config import Config
from bert.geometry import row_shape
from bert.model.batch import Batch
from bert.model.stages import Stage, make_stages, placement
from bert.tasks import make_model, make_task
from ops.ipu import MATMULS, lowering

__all__ = ["Operation", "Trace", "Value", "trace"]

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass
class Value:
    """A tensor with memory of its own. Views of it are the same value."""

    count: int
    """Numbers in it."""
    bytes: int
    made_by: Optional[int] = None
    """Index of the operation that makes it; None for a parameter and for the batch."""
    parameter: Optional[str] = None
    """Its name, if it is a parameter."""
    differentiable: bool = False
    """Whether it has a gradient."""
    saved_by: Optional[int] = None
    """Index of the first operation whose gradient needs it: the backward pass keeps it until then."""


@dataclass
class Operation:
    """An operation that makes new tensors."""

    block: str
    name: str
    """A matrix product's name in ops.ipu.MATMULS, if the model says it; otherwise ATen's."""
    inputs: List[int]
    """Indices of values; so are the outputs."""
    outputs: List[int] = field(default_factory=list)
    product: Tuple[int, int, int, int] = (0, 0, 0, 0)
    """batch, rows, inner, columns of a matrix product."""
    gradients: int = 0
    """How many of a product's operands have a gradient: the backward pass has as many products."""
    parts: int = 1
    """In how many parts, of its columns, a serialized product is computed."""

    @property
    def flops(self) -> int:
        """Of the forward pass, for matrix products only. A multiplication and an addition are 2."""
        batch, rows, inner, columns = self.product
        return 2 * batch * rows * inner * columns


@dataclass
class Trace:
    """One micro-batch through the model. Operations are in the order of execution."""

    stages: List[Stage]
    operations: List[Operation] = field(default_factory=list)
    values: List[Value] = field(default_factory=list)
    checkpoints: List[int] = field(default_factory=list)
    """Values that are kept for the backward pass, which recomputes from them."""

    def of_stage(self, stage: Stage) -> List[int]:
        """Indices of the operations of a stage."""
        return [i for i, operation in enumerate(self.operations) if operation.block in stage.blocks]


def trace(config: Config) -> Trace:
    """Runs the model of `config`, as it is on IPUs, with one micro-batch that has shapes and types only."""
    ipu = config.ipu
    stages = make_stages(ipu.layers_per_ipu, ipu.matmul_proportion)
    layout = row_shape(config, static=True).layout(ipu.micro_batch_size)
    with torch.device("meta"):
        model = make_model(config, make_task(config))
        if config.training.precision != "float32":
            model.half()
        rows = {name: torch.empty(size, dtype=getattr(torch, dtype.__name__)) for name, (size, dtype) in layout.items()}
    tracer = Tracer(stages)
    for name, parameter in model.named_parameters():
        tracer.value(parameter).parameter = name
    # Each product tells its name in the place where PopTorch is told a memory proportion.
    names: Dict[str, Any] = {name: name for name in MATMULS}
    lowered = lowering(tracer, placement(stages), ipu.recompute_checkpoint_every_layer, proportions=names)
    with lowered, WholeOperations(), tracer, saved_tensors_hooks(tracer.save, tracer.save):
        model(Batch.of_rows(rows))
    return tracer.trace


class Tracer(TorchDispatchMode):
    """Records each operation that makes a new tensor; in PopTorch's place in the model, its annotations too."""

    def __init__(self, stages: List[Stage]):
        super().__init__()
        self.trace, self.block = Trace(stages), ""
        self.indices: Dict[int, int] = {}  # storage -> index of its value
        self.alive: List[torch.Tensor] = []  # a later tensor must not get the storage of an earlier one

    def index(self, tensor: torch.Tensor) -> int:
        """The index of a tensor's value, a new one if its storage is new."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self.indices:
            self.indices[storage] = len(self.trace.values)
            self.alive.append(tensor)
            self.trace.values.append(Value(tensor.numel(), tensor.numel() * tensor.element_size()))
        return self.indices[storage]

    def value(self, tensor: torch.Tensor) -> Value:
        return self.trace.values[self.index(tensor)]

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        inputs = list(tensors_in(arguments))
        for tensor in inputs:
            self.value(tensor).differentiable |= tensor.requires_grad
        operation = Operation(self.block, function.overloadpacket.__name__, [self.index(tensor) for tensor in inputs])
        known = len(self.trace.values)
        result = function(*arguments, **(options or {}))
        operation.outputs = sorted({i for i in map(self.index, tensors_in(result)) if i >= known})
        if not operation.outputs:
            return result
        if operation.name in MATRIX_PRODUCTS:
            left, right = inputs[-2:]
            batch = left.shape[0] if left.dim() == 3 else 1
            operation.product = (batch, left.shape[-2], left.shape[-1], right.shape[-1])
            operation.gradients = left.requires_grad + right.requires_grad
        for i in operation.outputs:
            self.trace.values[i].made_by = len(self.trace.operations)
        self.trace.operations.append(operation)
        return result

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Notes that the gradient of the operation that runs now needs `tensor`."""
        value, now = self.value(tensor), len(self.trace.operations)
        # An operation's inputs are saved before it runs, as they are; its outputs after it, without their history.
        if value.made_by is not None and value.made_by == now - 1 and not tensor.requires_grad:
            now -= any(self.trace.values[i].differentiable for i in self.trace.operations[-1].inputs)
        value.saved_by = now if value.saved_by is None else value.saved_by
        return tensor

    # What ops/ipu.py calls of PopTorch.

    class MatMulSerializationMode:
        OutputChannels = "output channels"

    @contextlib.contextmanager
    def Block(self, user_id: str, ipu_id: int) -> Iterator[None]:
        outer, self.block = self.block, user_id
        yield
        self.block = outer

    def Attribute(self, **values: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def recomputationCheckpoint(self, tensor: torch.Tensor) -> torch.Tensor:
        self.trace.checkpoints.append(self.index(tensor))
        return tensor

    def set_available_memory(self, tensor: torch.Tensor, available_memory_proportion: Any) -> torch.Tensor:
        self.trace.operations[self.made_by(tensor)].name = available_memory_proportion
        return tensor

    def serializedMatMul(self, lhs: torch.Tensor, rhs: torch.Tensor, mode: str, factor: int = 0) -> torch.Tensor:
        product = lhs @ rhs
        self.trace.operations[self.made_by(product)].parts = factor
        return product

    def identity_loss(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    def made_by(self, product: torch.Tensor) -> int:
        made_by = self.value(product).made_by
        assert made_by is not None, "an operation makes every product"
        return made_by


class WholeOperations(TorchFunctionMode):
    """Operations that PopTorch takes whole and PyTorch takes apart: dropout, whose mask the IPU draws again instead of
    keeping it, and one_hot, which tensors without memory do not have."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if name == "dropout":
            return arguments[0] * 1.0
        if name == "one_hot":
            return torch.empty(arguments[0].shape + (arguments[1],), dtype=torch.int32, device="meta")
        return function(*arguments, **(options or {}))


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
