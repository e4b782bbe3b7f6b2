"""What all processes of a run must have alike: looked at before the first step, and as the run goes."""

import dataclasses
import glob
import hashlib
import os
from typing import Any, Dict, Optional

import numpy as np
import torch

from bert.config import Config
from bert.engines import Engine
from bert.engines.parallel.processes import current
from bert.errors import ProcessesDiffer
from bert.run.data_set import DataSet
from bert.run.state import RunState
from data.errors import InputError
from data.loading.loader import GlobalBatch
from data.subprocesses import PROJECT

__all__ = ["check_same_data", "check_same_settings", "check_same_weights", "note_batch"]

# The first process alone writes; and how rows are cut and read changes no result.
MAY_DIFFER = ("training.output", "training.micro_batch_size", "data.workers")


def check_same_settings(config: Config, device: str) -> None:
    """Raises InputError, in all processes, where one has another config, device, torch, numpy or source."""
    if current():
        settings = {
            f"{section}.{key}": value
            for section, values in dataclasses.asdict(config).items()
            for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        facts = {key.rstrip("."): value for key, value in settings.items() if key not in MAY_DIFFER}
        facts.update({"the device found": device, "torch": torch.__version__, "numpy": np.__version__})
        facts["the hash of the project's source"] = hash_of_source()
        check(facts, "Start all processes of a run with one config, and one version of the project and its libraries")


def hash_of_source() -> str:
    found = hashlib.sha256()
    for package in ("bert", "data", "ops"):
        for path in sorted(glob.glob(os.path.join(PROJECT, package, "**", "*.[pch]*"), recursive=True)):
            if path.endswith((".py", ".cpp", ".h")):
                with open(path, "rb") as file:
                    found.update(os.path.relpath(path, PROJECT).encode() + file.read())
    return found.hexdigest()[:12]


def check_same_data(data_set: DataSet, checkpoint: Optional[str], state: RunState) -> None:
    """Raises InputError, in all processes, where one has other shards, another vocabulary or another checkpoint."""
    if current():
        identity = data_set.identity()
        facts: Dict[str, Any] = {f"samples of {name}": count for name, count in identity["shards"]}
        facts.update(data_set.facts())
        facts["the vocabulary's hash"] = identity["vocab_sha256"]
        facts["the tokenizer's rules"] = identity["tokenizer"]
        facts["the checkpoint"] = checkpoint and os.path.basename(checkpoint)
        facts["the last step evaluated"] = state.evaluated
        facts["the shards left out"] = sorted(map(os.path.basename, state.skipped))
        check(facts, "All need the same files: training.output and data.files on a file system that machines share")


def check(facts: Dict[str, Any], advice: str) -> None:
    processes = current()
    assert processes is not None
    try:
        processes.check_same(facts, advice)
    except ProcessesDiffer as error:
        raise InputError(str(error))


def note_batch(batch: GlobalBatch) -> None:
    """Has the step on this batch end with ProcessesDiffer where a process left out other shards, or has another
    batch."""
    processes = current()
    if processes:
        left_out = sorted(map(os.path.basename, batch.skipped))
        processes.note_batch({"the shards left out": left_out, "the place in the data set": batch.position})


def check_same_weights(engine: Engine) -> None:
    """Raises ProcessesDiffer where a process has other weights: each holds all of them, and updates its own."""
    processes = current()
    if processes and not engine.sharded:
        total = sum(int(weight.view(torch.int32).sum(dtype=torch.int64)) for weight in engine.weights().values())
        processes.check_same(
            {f"the sum of the weights' bits after step {engine.steps_done}": total},
            "They should be the same to the last bit: machines may be of different kinds, or one may be broken. "
            "Nothing was saved; start again with --resume auto",
        )
