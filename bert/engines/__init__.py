"""Engines run optimizer steps on one kind of device. Nothing above knows which one it drives.

A fork adds its own: `ENGINES["name"] = make`, and the name to `device` in bert/config.py.
"""

from typing import Callable, Dict

from bert.config import Config
from bert.engines.choosing import (
    evaluated_part,
    find_device,
    has_static_shapes,
    local_parts,
    makes_up_input,
    part_of,
    process_of,
)
from bert.engines.engine import Engine
from bert.engines.ipu import IpuEngine
from bert.engines.micro_batch import fit_micro_batch
from bert.engines.torch_devices import Cpu, Cuda, TorchDevice, choose_precision
from bert.engines.torch_engine import TorchEngine
from bert.geometry import row_shape
from bert.model.model import Model, initialize
from bert.tasks import Task, make_model, make_task
from data.errors import InputError

__all__ = ["ENGINES", "Engine", "evaluated_part", "find_device", "has_static_shapes", "local_parts", "make_engine"]
__all__ += ["makes_up_input", "part_of", "process_of"]


def make_engine(config: Config, device: str, make_model: Callable[[Config, Task], Model] = make_model) -> Engine:
    """The engine for `device`, one of ENGINES, its model initialised from the seed. Raises InputError for another."""
    if device not in ENGINES:
        raise InputError(f'device is "{device}", expected one of {", ".join(ENGINES)}')
    task = make_task(config)
    model = make_model(config, task)
    initialize(model, config.model.initializer_range, config.training.seed)
    return ENGINES[device](config, task, model)


def make_torch_engine(config: Config, task: Task, model: Model, device: TorchDevice) -> TorchEngine:
    """With the config's micro-batch, or the one that suits the device and fits it."""
    data, training = config.data, config.training
    value_bytes = 4 if choose_precision(device, training.precision) == "float32" else 2
    suitable = device.hidden_bytes // (value_bytes * data.sequence_length * config.model.hidden_size)
    rows = max(1, min(training.micro_batch_size or suitable, training.global_batch_size))
    engine = TorchEngine(config, task, model, device, rows)
    if not training.micro_batch_size and engine.parallel.can_redo:
        fit_micro_batch(engine, row_shape(config, static=False), rows)
    return engine


ENGINES: Dict[str, Callable[[Config, Task, Model], Engine]] = {
    "cpu": lambda config, task, model: make_torch_engine(config, task, model, Cpu()),
    "cuda": lambda config, task, model: make_torch_engine(config, task, model, Cuda()),
    "ipu": IpuEngine,
}
