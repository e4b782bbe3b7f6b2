"""Commands where what Linux alone has is absent, as on macOS, and on Windows."""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.bert.run.runs import saved_step

# Is imported by every Python process as it starts.
MACOS = """
import builtins, io, os, sys
for name in ("memfd_create", "posix_fadvise", "posix_fallocate", "preadv", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
open_file = io.open
def open_without_proc(path, *arguments, **options):
    if isinstance(path, str) and path.startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", path)
    return open_file(path, *arguments, **options)
builtins.open = open_without_proc
import ctypes, socket
del socket.SO_PEERCRED
make = ctypes.CDLL.__getattr__
def find(library, name):
    if name == "mallopt":
        raise AttributeError(name)
    return make(library, name)
ctypes.CDLL.__getattr__ = find
"""
CLANG = """#!/bin/sh
echo "clang: error: unsupported option '-fopenmp'" >&2
exit 1
"""


def environment(tmp_path):
    clang = tmp_path / "clang++"
    clang.write_text(CLANG)
    clang.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text(MACOS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return dict(os.environ, PYTHONPATH=path, CXX=str(clang), TORCH_EXTENSIONS_DIR=str(tmp_path / "kernels"))


def test_without_what_linux_alone_has_text_becomes_shards_and_a_model(tmp_path):
    documents = [f"The number {i} is here. It is {i} times {i % 7} of all that is." for i in range(400)]
    (tmp_path / "some.txt").write_text("\n\n".join(documents))
    sizes = dict(vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = {
        "model": {**sizes, "max_position_embeddings": 32},
        "data": {
            "text": str(tmp_path / "some.txt"),
            "files": str(tmp_path / "data" / "train-*.h5"),
            "sequence_length": 32,
            "mask_tokens": 5,
        },
        "optimizer": {"learning_rate": 0.01},
        "training": {"global_batch_size": 16, "max_steps": 2, "output": str(tmp_path / "run")},
        "ipu": {"layers_per_ipu": [0, 1]},
    }
    (tmp_path / "small.json").write_text(json.dumps(config))
    command = [sys.executable, "run_pretraining.py", "--config", str(tmp_path / "small.json"), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert saved_step(tmp_path / "run" / "checkpoints" / "step_00000002") == 2
    assert done.stderr.count("unsupported option '-fopenmp'. They need") == 1 and "slower operations" in done.stderr


@pytest.mark.parametrize("module", ["run_pretraining", "data.prepare", "data.inspect"])
def test_on_windows_the_one_line_says_wsl(module):
    code = f"import sys; sys.modules['fcntl'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "WSL" in done.stderr
