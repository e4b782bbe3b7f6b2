"""Schedules of the learning rate: a linear warm-up to the peak, then one of SCHEDULES.

Another schedule is one more entry, `SCHEDULES["mine"] = mine`; the config then takes `optimizer.schedule` mine.
"""

import math
from typing import Callable, Dict

from bert.config import OptimizerConfig

__all__ = ["SCHEDULES", "learning_rate_at"]

Schedule = Callable[[OptimizerConfig, int, int, int], float]


def linear(config: OptimizerConfig, step: int, peak_step: int, max_steps: int) -> float:
    """Down in a straight line, to reach 0 after the last step."""
    return config.learning_rate * (max_steps + 1 - step) / (max_steps + 1 - peak_step)


def cosine(config: OptimizerConfig, step: int, peak_step: int, max_steps: int) -> float:
    """Down along half a cosine, to reach 0 after the last step."""
    progress = (step - peak_step) / (max_steps + 1 - peak_step)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def wsd(config: OptimizerConfig, step: int, peak_step: int, max_steps: int) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): the peak, then linear over the last `decay_ratio` of all steps."""
    last_at_peak = max(peak_step, max_steps - whole_steps(config.decay_ratio, max_steps))
    return config.learning_rate if step <= last_at_peak else linear(config, step, last_at_peak, max_steps)


def constant(config: OptimizerConfig, step: int, peak_step: int, max_steps: int) -> float:
    """The peak, to the end."""
    return config.learning_rate


# (config, step, peak_step, max_steps) -> the learning rate of a step from peak_step, which has the peak, to max_steps.
SCHEDULES: Dict[str, Schedule] = {"linear": linear, "cosine": cosine, "wsd": wsd, "constant": constant}


def learning_rate_at(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of step 1..max_steps. The last step of the warm-up has the peak, without one the first step."""
    warmup = whole_steps(config.warmup_ratio, max_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    return SCHEDULES[config.schedule](config, step, max(1, warmup), max_steps)


def whole_steps(ratio: float, max_steps: int) -> int:
    return math.ceil(round(ratio * max_steps, 6))  # 0.28 * 10500 is a little over 2940 in floating point
