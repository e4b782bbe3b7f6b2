"""Of what a run was made: the code, the software, the machine, the data, the command."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from bert.config import Config
from bert.machine import cpu_name
from bert.run.handshake import hash_of_source
from data.subprocesses import PROJECT

__all__ = ["describe_session"]


def describe_session(config: Config, step: int, device_line: str, processes: int, data_set: Dict) -> Dict[str, Any]:
    """What run.json has of each time that the run is started or goes on, here after `step`; `data_set` is its
    identity."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    versions = {"project": version(), "python": platform.python_version()}
    return {
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "after_step": step,
        "command": " ".join(map(shlex.quote, ["python", *sys.argv])),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "source_sha256": hash_of_source(),
        "versions": {**versions, "torch": torch.__version__, "numpy": np.__version__},
        "device": device_line,
        "processor": cpu_name(),
        "processes": processes,
        "data_sha256": hashlib.sha256(json.dumps(data_set).encode()).hexdigest(),
        "config": dataclasses.asdict(config),
    }


def git(*words: str) -> Optional[str]:
    """What git says of the project's folder; None where there is no git, or the folder is no checkout of its own."""

    def say(words: List[str]) -> str:
        done = subprocess.run(["git", "-C", PROJECT, *words], stdout=-1, stderr=-1, check=True, timeout=20)
        return os.fsdecode(done.stdout).strip()

    try:
        return say([*words]) if os.path.samefile(say(["rev-parse", "--show-toplevel"]), PROJECT) else None
    except (OSError, subprocess.SubprocessError):
        return None


def version() -> str:
    """The project's: what pyproject.toml says in a checkout, else that of the installed package."""
    path = os.path.join(PROJECT, "pyproject.toml")
    if not os.path.exists(path):
        return importlib.metadata.version("bert-pretraining")
    with open(path, encoding="utf-8") as file:
        found = re.search(r'^version = "(.*)"$', file.read(), re.MULTILINE)
    return found[1] if found else "unknown"
