"""The files of a corpus: those that paths, folders, URLs and globs name."""

import glob
import logging
import os
from collections import Counter
from typing import Iterator, List, Sequence, Set

from data.errors import InputError
from data.preparing.python_prose import PYTHON, python_bytes
from data.preparing.remote import base_name, find_remote, is_url, remote_size

__all__ = ["corpus_bytes", "ending", "file_bytes", "find_files"]

logger = logging.getLogger(__name__)

COMPRESSED = (".gz", ".zst")
# Names of text in a folder; what has no ending, as WikiExtractor's wiki_00, is text, too.
TEXT_ENDINGS = ("", ".txt", ".text", ".md", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def find_files(inputs: Sequence[str]) -> List[str]:
    """The files that paths, folders, URLs and globs of them name, each once, sorted; `python` stays as it is.

    A folder is its text files, also those in its subfolders, by their endings; what is left out is logged. Raises
    InputError that names the input for which there is no file.
    """
    files: Set[str] = set()
    for name in inputs:
        if is_url(name):
            files.update(find_remote(name))
            continue
        literal = name == PYTHON or os.path.exists(name)
        matches = [name] if literal else [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
        if not matches:
            raise InputError(
                f"{name}: no file matches; --input takes text files, folders, URLs, globs in quotes such as "
                f"'corpus/*.txt', or {PYTHON!r} for the prose of Python's own manual"
            )
        files.update(matches)
    folders = sorted(path for path in files - {PYTHON} if not is_url(path) and os.path.isdir(path))
    files.difference_update(folders)
    seen = set(map(os.path.realpath, files))
    for folder in folders:
        files.update(files_in(folder, seen))
    for path in sorted(path for path in files - {PYTHON} if not is_url(path)):
        if not os.path.isfile(path):
            raise InputError(f"{path}: is not a file; if it is a link, what it leads to is gone")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: may not be read; give yourself the right to, with `chmod +r`")
    if not files:
        raise InputError(f"no input is named; --input takes text files, folders, globs or {PYTHON!r}")
    return sorted(files)


def files_in(folder: str, seen: Set[str]) -> List[str]:
    """The text files of a folder but those whose real path was `seen`, to which it adds them."""
    found, left_out = [], Counter()  # type: ignore[var-annotated]
    for path in walk(folder, set()):
        if os.path.realpath(path) in seen:
            continue
        name = os.path.basename(path)
        # A vocabulary beside the text, or in the shards of an earlier run.
        kind = "hidden" if name.startswith(".") else name if name == "vocab.txt" else ending(path)
        if kind in TEXT_ENDINGS:
            seen.add(os.path.realpath(path))
            found.append(path)
        else:
            left_out[kind] += 1
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    if not found:
        expected = f"no text file is in this folder (found {others or 'nothing else'}); expected names that end in"
        endings = ", ".join(TEXT_ENDINGS[1:])
        raise InputError(f"{folder}: {expected} {endings} or nothing. Name others by a glob, such as '{folder}/*.log'")
    if others:
        logger.warning("%s: left out by their names: %s. Name what is text by a glob", folder, others)
    return found


def walk(folder: str, seen: Set[str]) -> Iterator[str]:
    """The files of a folder and its subfolders, sorted; a folder that links lead to twice comes once."""
    if os.path.realpath(folder) in seen:
        return
    seen.add(os.path.realpath(folder))
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror})")
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            yield path
        elif not name.startswith("."):
            yield from walk(path, seen)


def ending(path: str) -> str:
    """The ending of a file's name, in small letters, without that of its compression."""
    root, last = os.path.splitext(base_name(path).lower())
    return os.path.splitext(root)[1] if last in COMPRESSED else last


def corpus_bytes(files: Sequence[str]) -> int:
    """How many bytes `data.preparing.corpus.documents` reports to `on_bytes` for these files, in all."""
    return sum(map(file_bytes, files))


def file_bytes(path: str) -> int:
    if path == PYTHON:
        return python_bytes()
    return remote_size(path) if is_url(path) else os.path.getsize(path)
