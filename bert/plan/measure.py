"""`--plan` for CUDA and CPU: measures a micro-batch on this machine, and from it how long the run takes."""

import time
from dataclasses import dataclass
from typing import List

import torch

from bert.config import Config
from bert.engines import choose_device
from bert.engines.micro_batch import full_rows
from bert.run.training import make_engine
from bert.validation import validate_for_ipu

__all__ = ["Measured", "measure"]

ENOUGH_SECONDS, ENOUGH_TIMES = 2.0, 3


@dataclass(frozen=True)
class Measured:
    """What was measured, and where."""

    machine: str
    """Device, precision, micro-batches, in words."""
    rows: int
    """Of a micro-batch."""
    micro_batch: float
    """Seconds of its forward and backward pass."""
    update: float
    """Seconds of LAMB's update."""


def measure(config: Config, rows_of_a_step: int) -> Measured:
    """Runs micro-batches of full rows, one sample each, on the device of `config`, with initial weights that stay as
    they are.

    Raises InputError where the device is not there, where not even one row fits it, and where `auto` finds IPUs that
    cannot run `config`.
    """
    device, line = choose_device(config.device)
    if device == "ipu":
        validate_for_ipu(config)  # raises: else the plan were for IPUs
    engine = make_engine(config, device)
    if device == "cuda" and not config.training.micro_batch_size:
        engine.cut_evenly(rows_of_a_step)
    rows = engine.micro_batch_size = min(engine.micro_batch_size, rows_of_a_step)
    batch = full_rows(rows, config.data.sequence_length, config.data.mask_tokens, 1)
    engine.graph.train()

    def pass_once() -> None:
        for _, part in engine.micro_batches(batch):
            engine.backward(engine.forward(part, {}))

    def seconds_of(function, *arguments) -> float:
        function(*arguments)  # the first compiles, and takes memory
        times: List[float] = []
        while sum(times) < ENOUGH_SECONDS and len(times) < ENOUGH_TIMES:
            before = now(device)
            function(*arguments)
            times.append(now(device) - before)
        return sum(times) / len(times)

    micro_batch = seconds_of(pass_once)
    return Measured(f"{line}, {engine.describe()}", rows, micro_batch, seconds_of(engine.update, 0.0))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
