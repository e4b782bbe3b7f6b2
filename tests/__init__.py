"""Tests, in folders as the code is."""

import os
import subprocess
import sys
from typing import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sources(*folders: str) -> Iterator[str]:
    """The Python files of folders, relative to the project's."""
    for folder in folders:
        for place, _, names in os.walk(os.path.join(ROOT, folder)):
            paths = (os.path.join(place, name) for name in sorted(names) if name.endswith(".py"))
            yield from (os.path.relpath(path, ROOT) for path in paths)


def assert_help_teaches(module: str, example: str, code: str) -> None:
    """That `python -m module --help` has the example, and that `code`, in a process of its own, exits with 0."""
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert example.encode() in shown.stdout
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
