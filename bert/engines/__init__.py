"""Engines run optimizer steps on one kind of device. Nothing above knows which one it drives.

A fork adds its own: `ENGINES["name"] = make`, and the name to `device` in bert/config.py.
"""

from typing import Callable, Dict, Tuple

import torch

from bert.config import Config
from bert.engines.choosing import (
    check_processes,
    evaluated_part,
    find_device,
    has_static_shapes,
    local_parts,
    makes_up_input,
    numa_nodes,
    part_of,
    process_of,
    take_cores,
)
from bert.engines.engine import Engine
from bert.engines.ipu import IpuEngine
from bert.engines.micro_batch import fit_micro_batch
from bert.engines.torch_devices import Cpu, Cuda, Mps, TorchDevice, choose_precision
from bert.engines.torch_engine import TorchEngine
from bert.geometry import samples_per_row
from bert.model.model import Model, initialize
from bert.tasks import Task, make_model, make_task
from data.errors import InputError

__all__ = [
    "ENGINES",
    "Engine",
    "check_processes",
    "evaluated_part",
    "expected_of_torch",
    "find_device",
    "has_static_shapes",
    "local_parts",
]
__all__ += ["local_parts", "make_engine", "makes_up_input", "numa_nodes", "part_of", "process_of"]


def make_engine(config: Config, device: str, make_model: Callable[[Config, Task], Model] = make_model) -> Engine:
    """The engine for `device`, one of ENGINES, its model initialised from the seed. Raises InputError for another."""
    if device not in ENGINES:
        raise InputError(f'device is "{device}", expected one of {", ".join(ENGINES)}')
    if device == "cpu":
        take_cores()
    task = make_task(config)
    model = make_model(config, task)
    initialize(model, config.model.initializer_range, config.training.seed)
    return ENGINES[device](config, task, model)


def make_torch_engine(config: Config, task: Task, model: Model, device: TorchDevice) -> TorchEngine:
    """With the config's micro-batch, or the one that suits the device and fits it."""
    rows = suitable_rows(config, device, choose_precision(device, config.training.precision))
    engine = TorchEngine(config, task, model, device, rows)
    if not config.training.micro_batch_size and engine.parallel.can_redo:
        fit_micro_batch(engine, task.row_shape(config.data, samples_per_row(config.data, static=False)), rows)
    return engine


def suitable_rows(config: Config, device: TorchDevice, precision: str) -> int:
    """Rows of a micro-batch, memory aside."""
    training, value_bytes = config.training, 4 if precision == "float32" else 2
    tokens_of_row = make_task(config).row_shape(config.data, samples_per_row(config.data, static=False)).tokens
    # Where models are in parts, nothing tries what fits; and the stages of a pipeline hold several micro-batches.
    in_parts = config.parallel.shard != "none" or config.parallel.pipeline > 1
    hidden_bytes = device.hidden_bytes // (8 if in_parts and device.memory else 1)
    suitable = hidden_bytes // (value_bytes * tokens_of_row * config.model.hidden_size)
    return max(1, min(training.micro_batch_size or suitable, training.global_batch_size))


def expected_of_torch(config: Config) -> Tuple[str, int, int, bool]:
    """Of a run on CUDA, mps or CPU, for a plan: the precision, the rows of a micro-batch, how many bytes of logits are
    there at a time, at most, and whether weights are packed. A CUDA device that is not here is taken to have bfloat16
    and memory enough."""
    name = config.device if config.device in TORCH_DEVICES else find_device(config)[0]
    device = TORCH_DEVICES[name]()
    precision: str = config.training.precision
    if precision == "auto":
        is_here = device.memory is None or torch.cuda.is_available()
        precision = choose_precision(device, precision) if is_here else "bfloat16"
    logit_bytes = {"cpu": 2**25, "mps": 2**29}.get(name, 2**31)
    return precision, suitable_rows(config, device, precision), logit_bytes, name == "cpu"


TORCH_DEVICES: Dict[str, Callable[[], TorchDevice]] = {"cpu": Cpu, "cuda": Cuda, "mps": Mps}
ENGINES: Dict[str, Callable[[Config, Task, Model], Engine]] = {
    "cpu": lambda config, task, model: make_torch_engine(config, task, model, Cpu()),
    "cuda": lambda config, task, model: make_torch_engine(config, task, model, Cuda()),
    "mps": lambda config, task, model: make_torch_engine(config, task, model, Mps()),
    "ipu": IpuEngine,
}
