"""`--plan` for CUDA and CPU: measures a micro-batch on this machine, and from it how long the run takes."""

from dataclasses import dataclass
from typing import Dict, List

from bert.config import Config
from bert.engines import find_device, make_engine
from bert.engines.micro_batch import full_rows
from bert.geometry import row_shape

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
    """Seconds of the optimizer's update."""


def measure(config: Config, rows_of_a_step: int) -> Measured:
    """Runs steps of one micro-batch of full rows, one sample each, on the device of `config`, from initial weights.

    Raises InputError where the device is not there, where not even one row fits it, and where `auto` finds IPUs that
    cannot run `config`.
    """
    device, line = find_device(config)
    engine = make_engine(config, device)
    engine.expect_rows(rows_of_a_step)
    rows = engine.micro_batch_size = min(engine.micro_batch_size, rows_of_a_step)
    batch = full_rows(rows, row_shape(config, static=False)._replace(mask_slots=config.data.mask_tokens, samples=1))
    engine.measure(batch)  # the first compiles, and takes memory
    times: List[Dict[str, float]] = []
    while sum(sum(parts.values()) for parts in times) < ENOUGH_SECONDS and len(times) < ENOUGH_TIMES:
        times.append(engine.measure(batch))
    seconds = {part: sum(parts[part] for parts in times) / len(times) for part in times[0]}
    update = seconds.pop("optimizer", 0.0)
    return Measured(f"{line}, {engine.describe()}", rows, sum(seconds.values()), update)
