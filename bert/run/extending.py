"""Runs that go on otherwise than they began: with another number of steps, or as a branch of another run."""

import json
import logging
import os
import shlex
from dataclasses import replace
from typing import Dict, Optional

from bert.config import Config
from bert.run.checkpoint import list_checkpoints, name_of
from bert.run.run_folder import decisive_settings, settings_of
from bert.run.state import RunState, read_state
from bert.schedules import learning_rate_at
from bert.start_from import DECISIVE_KEYS
from data.errors import InputError
from data.files import read_json

__all__ = ["check_max_steps", "find_branch", "read_branch"]

logger = logging.getLogger(__name__)
KEPT_BY_BRANCHES = tuple(f"model.{key}" for key in DECISIVE_KEYS) + (
    "task.name",
    "task.nsp",
    "task.labels",
    "optimizer.name",
)


def check_max_steps(config: Config, step: int) -> None:
    """Says what becomes of the learning rate where the run in the output folder, which has done `step` steps, has
    another training.max_steps now. Raises InputError where that is below `step`."""
    path, now = os.path.join(config.training.output, "run.json"), config.training.max_steps
    before = settings_of(path)["training.max_steps"] if os.path.exists(path) else now
    if now == before:
        return
    if now < step:
        raise InputError(
            f"training.max_steps is {now}, and {config.training.output} has done {step} steps already; expected at "
            f"least {step}. To go on from an earlier checkpoint: --training.branch_from {config.training.output}@STEP "
            "--training.output ANOTHER"
        )
    logger.info(f"training.max_steps was {before} and is {now} now: {rates_in_words(config, step, before)}")


def rates_in_words(config: Config, step: int, before: int) -> str:
    """What another number of steps does to the learning rate after `step`."""
    optimizer, now = config.optimizer, config.training.max_steps
    if step in (0, now):
        return "no step is done yet" if step == 0 else "no step is left to do"
    last, following = learning_rate_at(step, optimizer, before), learning_rate_at(step + 1, optimizer, now)
    change = "stays at" if following == last else "rises to" if following > last else "falls to"
    words = f"the learning rate was {last:.3g} at step {step} and {change} {following:.3g} at step {step + 1}"
    if optimizer.schedule == "wsd" and last < learning_rate_at(step, replace(optimizer, schedule="constant"), before):
        words += (
            f". The decay had begun; to branch from before it: --training.branch_from {config.training.output}@STEP"
        )
    return words


def find_branch(config: Config) -> Optional[str]:
    """The checkpoint that training.branch_from names. Raises InputError where there is none."""
    named = config.training.branch_from
    if named is None:
        return None
    if os.path.exists(os.path.join(named, "training_state.json")):
        return named
    run, separator, step = named.rpartition("@")
    if not separator or not step.isdigit():
        raise InputError(
            f"training.branch_from is {json.dumps(named)}, expected RUN@STEP, such as runs/quickstart@300, or the "
            "folder of a checkpoint, which has a training_state.json"
        )
    folder = os.path.join(run, "checkpoints")
    path = os.path.join(folder, name_of(int(step)))
    if not os.path.isdir(path):
        there = ", ".join(str(int(os.path.basename(other)[len("step_") :])) for other in list_checkpoints(folder))
        steps = f"expected one of those that are there: {there}" if there else f"and there is none in {folder}"
        raise InputError(f"training.branch_from is {json.dumps(named)}: no checkpoint of step {step}, {steps}")
    return path


def read_branch(path: str, config: Config, data_set: Dict, may_lack_shards: bool) -> RunState:
    """Where a branch begins, and says in which settings it differs. Raises InputError where it cannot go on from
    there."""
    state = read_state(path, data_set, may_lack_shards)
    there = read_json(os.path.join(path, "training_state.json"))["config"]
    kept, differences = {}, []
    for key, value in decisive_settings(config).items():
        section, name = key.split(".")
        before = there.get(section, {}).get(name, value)
        if before != value and key in KEPT_BY_BRANCHES:
            kept[f"{key} is {json.dumps(before)} there, expected {json.dumps(value)}"] = (
                f"--{key} {shlex.quote(before if isinstance(before, str) else json.dumps(before))}"
            )
        elif before != value and name not in ("start_from", "branch_from"):
            differences.append(f"{key} {json.dumps(value)} (was {json.dumps(before)})")
    if kept:
        raise InputError(
            f"{path}: {'; '.join(kept)}. A branch keeps that: add {' '.join(kept.values())}. For the weights alone: "
            f"--training.start_from {path}"
        )
    if config.training.max_steps <= state.step:
        least = f"expected more than {state.step}, the step that it branches from"
        raise InputError(f"training.max_steps is {config.training.max_steps}, {least}")
    logger.info(f"branches from {path}, with {', '.join(differences) if differences else 'the same settings'}")
    state.evaluated, state.best = state.step, {}  # they are the other run's
    return state
