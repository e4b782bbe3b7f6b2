"""A run's folder: whose run it holds, how far it is, and that only one process works in it.

run.json         the settings that decide where the run goes, and of each time that it started or went on with what
state.json       that it is finished, or which torchruns have it train
metrics.jsonl, held_out.jsonl    one object a line        held_out.json    the last of them, of a run that is done
curve.png, tensorboard/          checkpoints/step_<step>, checkpoints/best.json
"""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
from typing import Any, Collection, Dict, Iterator, Mapping, Optional

from bert.config import Config, TaskConfig
from bert.run.checkpoint import list_checkpoints
from bert.run.curve import read_metrics
from data.errors import InputError
from data.files import read_json, replacing, write_json

__all__ = ["checkpoints_of", "claim", "decisive_settings", "find_checkpoint", "is_begun_by", "is_finished"]
__all__ += ["mark_finished", "settings_of"]

OWN_FILES = ("metrics.jsonl", "held_out.jsonl", "curve.png", "held_out.json", "tensorboard", "checkpoints")
# The settings that decide where a run goes. The others (device, micro-batch, logging ...) may change when it is
# resumed.
DECISIVE = {
    "model": None,
    "task": tuple(key.name for key in dataclasses.fields(TaskConfig) if key.name != "folder"),  # files may move
    "optimizer": None,
    "training": ("global_batch_size", "max_steps", "seed", "start_from", "branch_from"),
    "data": ("sequence_length", "mask_tokens", "packing", "samples_per_row"),
}


def decisive_settings(config: Config) -> Dict[str, Any]:
    values = dataclasses.asdict(config)
    return {
        f"{section}.{key}": values[section][key]
        for section, keys in DECISIVE.items()
        for key in keys or values[section]
    }


def settings_of(path: str) -> Dict[str, Any]:
    """The decisive settings in a run.json. An older version's lacks keys that are new: it went by their defaults."""
    return {**decisive_settings(Config()), **read_json(path)}


def checkpoints_of(config: Config) -> str:
    """The folder of the run's checkpoints."""
    return os.path.join(config.training.output, "checkpoints")


def find_checkpoint(config: Config, rank: int = 0) -> Optional[str]:
    """The checkpoint to resume from, None to begin.

    Raises InputError where the output folder holds another run: in the process of `rank` 0, which works in it, while
    others look for its checkpoint only.
    """
    folder = config.training.output
    path = os.path.join(folder, "run.json")
    if rank == 0 and not can_resume(config, folder, path):
        return None
    checkpoints = list_checkpoints(checkpoints_of(config)) if config.resume == "auto" else []
    return checkpoints[-1] if checkpoints else None


def can_resume(config: Config, folder: str, path: str) -> bool:
    """Whether this run is in the folder; False where the folder is free."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"training.output: {folder} is a file, expected a folder or a new name")
    if not os.path.exists(path):
        taken = [name for name in OWN_FILES if os.path.exists(os.path.join(folder, name))]
        if taken:
            raise InputError(
                f"{folder}: has {', '.join(taken)} but no run.json, so it is no run of this project and nothing is "
                "overwritten. Choose another folder with --training.output"
            )
        return False
    if config.resume == "never":
        raise InputError(
            f"{folder}: holds a run already. Continue it with --resume auto, or choose another folder with "
            "--training.output"
        )
    there = settings_of(path)
    for key, value in decisive_settings(config).items():
        if there[key] != value and key != "training.max_steps":  # see bert/run/extending.py
            raise InputError(
                f"{path}: is another config's run: {key} is {json.dumps(there[key])} there, expected "
                f"{json.dumps(value)}. Choose another folder with --training.output; to go on from a step of that run "
                f"otherwise, add --training.branch_from {folder}@STEP"
            )
    return True


def is_begun_by(config: Config, torchruns: Collection[str]) -> bool:
    """Whether one of these has begun the run that is in the folder, or gone on with it."""
    state = os.path.join(config.training.output, "state.json")
    return os.path.exists(state) and not set(torchruns).isdisjoint(read_json(state).get("torchruns", []))


def is_finished(config: Config) -> bool:
    """Whether the run did all of its steps, its evaluation and its picture."""
    folder = config.training.output
    state, run = os.path.join(folder, "state.json"), os.path.join(folder, "run.json")
    if os.path.exists(state):
        return bool(read_json(state).get("finished"))
    # Older runs, which know no task, have no state.json: they drew their picture last.
    is_old = os.path.exists(run) and "task.name" not in read_json(run)
    return is_old and os.path.exists(os.path.join(folder, "curve.png"))


def mark_finished(config: Config) -> None:
    """Notes that nothing is left to do."""
    path = os.path.join(config.training.output, "state.json")
    write_json(path, {**read_json(path), "finished": True})


@contextlib.contextmanager
def claim(
    config: Config, step: int, evaluated: int, torchruns: Collection[str] = (), session: Mapping = {}
) -> Iterator[None]:
    """Makes the folder this process's own while open, and cuts metrics.jsonl back to `step` and held_out.jsonl to
    `evaluated`: the resumed run writes later lines again. Notes which `torchruns` have begun it, and in run.json the
    `session` (bert/run/provenance.py).

    Raises InputError when another process has it.
    """
    folder = config.training.output
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "run.json")
    with open(os.path.join(folder, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{folder}: another process is training there. Wait for it, or choose another folder with "
                "--training.output"
            )
        lines = {"metrics.jsonl": step, "held_out.jsonl": evaluated}
        in_checkpoints = ("checkpoints/best.json", "checkpoints/*/model.safetensors")
        for name in ("run.json", "state.json", "held_out.json", *lines, *in_checkpoints):
            for left in glob.glob(os.path.join(glob.escape(folder), name + ".tmp-*")):  # by a process that was killed
                os.remove(left)
        write_json(os.path.join(folder, "state.json"), {"finished": False, "torchruns": list(torchruns)})
        sessions = read_json(path).get("sessions", []) if os.path.exists(path) else []
        write_json(path, {**decisive_settings(config), "sessions": [*sessions, session]})
        for name, last in lines.items():
            cut_back(os.path.join(folder, name), last)
        yield


def cut_back(path: str, step: int) -> None:
    """Takes the lines after `step` out of a file, if it is there."""
    if os.path.exists(path):
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
