"""Files that appear whole or not at all, and JSON in them."""

import contextlib
import fcntl
import json
import os
from typing import Any, Dict, Iterator

from data.errors import InputError

__all__ = ["flush_to_disk", "read_json", "replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary path to write to: on success the file is flushed to disk and renamed to `path`, else removed.

    A killed process leaves a file named `path`.tmp-NUMBER behind.
    """
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def flush_to_disk(path: str) -> None:
    """Waits until what was written to a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS fsync leaves it in the drive's own memory
            with contextlib.suppress(OSError):  # a network's drive has none
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def write_json(path: str, value: Any) -> None:
    """Writes a value as JSON, in a file that appears whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str) -> Dict:
    """The object in a JSON file. Raises InputError that names the file when it cannot be read or holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}")
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, expected an object of keys and values")
    return value
