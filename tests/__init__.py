"""Tests, in folders as the code is."""

import os
from typing import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sources(*folders: str) -> Iterator[str]:
    """The Python files of folders, relative to the project's."""
    for folder in folders:
        for place, _, names in os.walk(os.path.join(ROOT, folder)):
            paths = (os.path.join(place, name) for name in sorted(names) if name.endswith(".py"))
            yield from (os.path.relpath(path, ROOT) for path in paths)
