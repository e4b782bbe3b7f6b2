"""A run's folder: whose run it holds, where it is to continue, and that only one process works in it.

run.json         the settings that decide where the run goes
metrics.jsonl    one object a line        curve.png, held_out.json, tensorboard/        checkpoints/step_<step>
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from typing import Dict, Iterator, Optional

from bert.config import Config
from bert.run.checkpoint import list_checkpoints, read_json, write_json
from bert.run.curve import read_metrics
from data.errors import InputError

__all__ = ["claim", "find_checkpoint"]

OWN_FILES = ("metrics.jsonl", "curve.png", "held_out.json", "tensorboard", "checkpoints")


def course(config: Config) -> Dict:
    """The settings that decide where a run goes; the others (device, micro-batch, logging ...) may change when it
    continues."""
    values = dataclasses.asdict(config)
    keys = [("model", key) for key in values["model"]] + [("optimizer", key) for key in values["optimizer"]]
    keys += [("training", key) for key in ("global_batch_size", "max_steps", "seed", "start_from")]
    keys += [("data", key) for key in ("sequence_length", "mask_tokens", "packing", "samples_per_row")]
    return {f"{section}.{key}": values[section][key] for section, key in keys}


def find_checkpoint(config: Config, index: int = 0) -> Optional[str]:
    """The checkpoint to continue from, None to begin. Raises InputError where the output folder holds another run: in
    the process of `index` 0, which works in it, while others look for its checkpoint only."""
    if index:
        checkpoints = (
            list_checkpoints(os.path.join(config.training.output, "checkpoints")) if config.resume == "auto" else []
        )
        return checkpoints[-1] if checkpoints else None
    folder = config.training.output
    path = os.path.join(folder, "run.json")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"training.output: {folder} is a file, expected a folder or a new name")
    if not os.path.exists(path):
        taken = [name for name in OWN_FILES if os.path.exists(os.path.join(folder, name))]
        if taken:
            raise InputError(
                f"{folder}: has {', '.join(taken)} but no run.json, so it is no run of this project and "
                "nothing is overwritten. Choose another folder with --training.output"
            )
        return None
    if config.resume == "never":
        raise InputError(
            f"{folder}: holds a run already. Continue it with --resume auto, or choose another folder with "
            "--training.output"
        )
    there, own = read_json(path), course(config)
    for key in own:
        if there.get(key) != own[key]:
            raise InputError(
                f"{path}: is another config's run: {key} is {json.dumps(there.get(key))} there, expected "
                f"{json.dumps(own[key])}. Choose another folder with --training.output"
            )
    checkpoints = list_checkpoints(os.path.join(folder, "checkpoints"))
    return checkpoints[-1] if checkpoints else None


@contextlib.contextmanager
def claim(config: Config, step: int) -> Iterator[None]:
    """Makes the folder this process's own while open, and cuts metrics.jsonl back to `step`: what came after will come
    again.

    Raises InputError when another process has it.
    """
    folder = config.training.output
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        write_json(path, course(config))
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{folder}: another process is training there. Wait for it, or choose another folder with "
                "--training.output"
            )
        metrics = os.path.join(folder, "metrics.jsonl")
        if os.path.exists(metrics):
            kept = [one for one in read_metrics(metrics) if one["step"] <= step]
            with open(metrics + ".new", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(one) + "\n" for one in kept)
            os.replace(metrics + ".new", metrics)
        yield
