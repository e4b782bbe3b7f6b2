"""Schedules of the learning rate."""

import math

from bert.config import OptimizerConfig

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, optimizer: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of step 1..max_steps: up to the peak at the last warm-up step, then down, to reach 0 after the
    last step."""
    warmup = math.ceil(
        round(optimizer.warmup_ratio * max_steps, 6)
    )  # 0.28 * 10500 is a little over 2940 in floating point
    if step <= warmup:
        return optimizer.learning_rate * step / warmup
    return optimizer.learning_rate * (max_steps - step + 1) / (max_steps - warmup + (1 if warmup else 0))
