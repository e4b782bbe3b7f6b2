"""Triton's kernels in its interpreter, without a GPU."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

__all__ = ["run_in_tritons_interpreter"]


def run_in_tritons_interpreter(file: str, *options: str) -> None:
    """Runs a file of tests in a process whose kernels are interpreted, which is decided as Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *options, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout
