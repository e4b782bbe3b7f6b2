"""A corpus that needs no file, named `python`: the English prose that every Python brings.

It is the topics of Python's manual and the standard library's docstrings: each topic and each module is a document,
each paragraph a line.
"""

import ast
import functools
import os
import re
import sysconfig
import warnings
from typing import Callable, Iterable, Iterator, List

__all__ = ["PYTHON", "python_bytes", "python_lines"]

PYTHON = "python"

RULE = re.compile(r"[-=*~^_]{3,}$")
NOT_PROSE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
PLAIN_WORD = re.compile(r"[\"'(`*]*[A-Za-z][A-Za-z'’-]*[\"')`*.,;:!?]*$")


def python_lines(on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The paragraphs of each topic, then of each module; "" ends a topic and a module. `on_bytes` is told each module's
    bytes.

    A paragraph that many modules repeat comes once.
    """
    from pydoc_data.topics import topics  # half a megabyte of text that only this corpus needs

    seen = {""}

    def new(paragraphs: Iterable[str]) -> Iterator[str]:
        for paragraph in paragraphs:
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph
        yield ""

    for name in sorted(topics):
        yield from new(prose(topics[name]))
    for path in python_modules():
        yield from new(docstring_prose(path))
        on_bytes(os.path.getsize(path))


def python_bytes() -> int:
    """How many bytes `python_lines` reports, in all."""
    return sum(map(os.path.getsize, python_modules()))


def python_modules() -> List[str]:
    """The files of the standard library that hold documentation, sorted."""
    modules = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in NOT_PROSE_FOLDERS]
        modules += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(modules)


@functools.lru_cache(maxsize=None)  # to parse the whole library takes seconds, and training a vocabulary reads it twice
def docstring_prose(path: str) -> List[str]:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError):  # templates and samples of bad code, which some distributions ship
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [paragraph for docstring in docstrings if docstring for paragraph in prose(docstring)]


def prose(text: str) -> List[str]:
    """The paragraphs of a text, each on one line, without those that are mostly code, tables, signatures or rules."""
    paragraphs = [
        [word for word in paragraph.split() if not RULE.match(word)] for paragraph in re.split(r"\n\s*\n", text)
    ]
    return [
        " ".join(words)
        for words in paragraphs
        if len(words) > 2 and words[0] != ">>>" and 2 * sum(map(bool, map(PLAIN_WORD.match, words))) >= len(words)
    ]
