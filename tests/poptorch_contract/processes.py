"""What poprun's processes do together: add up gradients, through files in the folder that STAND_IN_POPDIST_FOLDER
names."""

import os
import pathlib
import time

import numpy as np
import torch

__all__ = ["add_up", "instance_index", "instances", "is_poprun", "local_replicas", "start", "total_replicas"]

TIMEOUT = 60.0  # seconds


def is_poprun() -> bool:
    return "STAND_IN_POPDIST_INSTANCES" in os.environ


def _number(name: str) -> int:
    if not is_poprun():
        raise RuntimeError("popdist: the process was not started by poprun")
    return int(os.environ["STAND_IN_POPDIST_" + name])


def instances() -> int:
    return _number("INSTANCES")


def instance_index() -> int:
    return _number("INDEX")


def total_replicas() -> int:
    return _number("TOTAL_REPLICAS")


def local_replicas() -> int:
    if total_replicas() % instances():
        raise RuntimeError(f"popdist: {total_replicas()} replicas do not divide among {instances()} processes")
    return total_replicas() // instances()


_started = []


def start() -> None:
    if _started:
        raise RuntimeError("popdist.init() is called a second time")
    _started.append(instances())


def add_up(tensors, name: str, index: int, count: int):
    """The sum of every process's tensors, added in the processes' order, so that all of them get the same."""
    folder = pathlib.Path(os.environ["STAND_IN_POPDIST_FOLDER"])
    part = folder / (f"{name}-{index}.part")
    with part.open("wb") as file:
        np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    part.rename(part.with_suffix(".npz"))
    total = {}
    for other in range(count):
        path = folder / (f"{name}-{other}.npz")
        deadline = time.monotonic() + TIMEOUT
        while not path.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"popdist: process {other} did not come to {name} within {TIMEOUT} s")
            time.sleep(0.005)
        with np.load(str(path)) as file:
            for key in tensors:
                total[key] = total[key] + file[key] if key in total else file[key]
    return {key: torch.from_numpy(np.asarray(value)) for key, value in total.items()}
