"""Text files to documents, streamed: a document is a list of lines, each a sentence, a paragraph or a heading.

Formats of a text file (UTF-8):

    lines      documents end at blank lines, as in BERT's own data
    wikitext   documents begin at `= Title =` lines, as in WikiText. Headings of all levels stay as lines of their own, without
               their `=` signs; text before the first title is a document of its own

The name `python` stands for a corpus that needs no file: the English prose that every Python brings, which is its manual's
topics and the standard library's docstrings, each topic and each module a document and each paragraph a line.
"""

import ast
import codecs
import functools
import glob
import os
import re
import sysconfig
import warnings
from typing import Callable, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from data.errors import InputError

__all__ = ["FORMATS", "PYTHON", "Document", "corpus_bytes", "documents", "find_files"]

FORMATS = ("lines", "wikitext")
PYTHON = "python"

READ_BYTES = 1 << 20
# A longer document is handed on in parts, so that memory stays bounded for a book or a file without a blank line.
DOCUMENT_CHARACTERS = 1 << 20

RULE = re.compile(r"[-=*~^_]{3,}$")
NOT_PROSE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
PLAIN_WORD = re.compile(r"[\"'(`*]*[A-Za-z][A-Za-z'’-]*[\"')`*.,;:!?]*$")


class Document(NamedTuple):
    """A document, or a part of a long one: parts have the same `number` and follow each other."""

    number: int
    lines: List[str]


def find_files(inputs: Sequence[str]) -> List[str]:
    """The files that paths and globs name, each once, sorted; `python` stays as it is.

    Raises InputError that names the input for which there is no file.
    """
    found = set()
    for name in [inputs] if isinstance(inputs, str) else inputs:
        literal = name == PYTHON or os.path.exists(name)
        matches = [name] if literal else [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
        if not matches:
            raise InputError("%s: no file matches; --input takes text files, globs in quotes such as 'corpus/*.txt', or %r "
                             "for the prose of Python's own manual" % (name, PYTHON))
        found.update(matches)
    for path in sorted(found - {PYTHON}):
        if not os.path.isfile(path):
            raise InputError("%s: is not a file; name the text files in it, such as %r" % (path, os.path.join(path, "*.txt")))
        if not os.access(path, os.R_OK):
            raise InputError("%s: may not be read; give yourself the right to, with `chmod +r`" % path)
    if not found:
        raise InputError("no input is named; --input takes text files, globs or %r" % PYTHON)
    return sorted(found)


def corpus_bytes(files: Sequence[str]) -> int:
    """How many bytes `documents` reports to `on_bytes` for these files, in all."""
    return sum(sum(map(os.path.getsize, python_modules())) if path == PYTHON else os.path.getsize(path) for path in files)


def documents(files: Sequence[str], text_format: str = "lines",
              on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[Document]:
    """The documents of `files` (from `find_files`), in order, numbered from 0. Lines are stripped and never empty.

    A document of more than a million characters comes in parts, each cut at a line's end. `on_bytes` is told the bytes as
    they are read. Raises InputError that names the file and the place of a byte that is not UTF-8.
    """
    number = -1
    for path in files:
        if path == PYTHON:
            parts = split(python_lines(on_bytes), "lines")
        else:
            parts = split(read_lines(path, on_bytes), text_format)
        for begins, lines in parts:
            number += begins
            yield Document(number, lines)


def split(lines: Iterable[str], text_format: str) -> Iterator[Tuple[bool, List[str]]]:
    """The documents, or parts of long ones; with each, whether a document begins with it."""
    wikitext = text_format == "wikitext"
    part, characters, begins = [], 0, True
    for line in lines:
        boundary = is_title(line) if wikitext else not line
        if part and (boundary or characters >= DOCUMENT_CHARACTERS):
            yield begins, part
            part, characters, begins = [], 0, False
        begins = begins or boundary
        if line:
            part.append(heading_text(line) if wikitext and is_heading(line) else line)
            characters += len(line)
    if part:
        yield begins, part


def is_heading(line: str) -> bool:
    return line.startswith("= ") and line.endswith(" =") and heading_text(line) != ""


def is_title(line: str) -> bool:
    return is_heading(line) and not line.startswith("= =")


def heading_text(line: str) -> str:
    """The heading without as many `= ` as begin it and ` =` as end it: WikiText writes one of each for each level."""
    while line.startswith("= ") and line.endswith(" ="):
        line = line[2:-2].strip()
    return line.strip("= ")


def read_lines(path: str, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The stripped lines of a file, blank ones as "". A line beyond a megabyte is cut at a space, to bound memory."""
    line_number = 1
    with open(path, "rb") as file:
        rest = file.read(len(codecs.BOM_UTF8))
        offset = len(rest) if rest == codecs.BOM_UTF8 else 0
        on_bytes(len(rest))
        rest = rest[offset:]
        while True:
            block = file.read(READ_BYTES)
            on_bytes(len(block))
            data = rest + block
            end = len(data) if not block else data.rfind(b"\n") + 1
            if not end and len(data) > READ_BYTES:
                end = data.rfind(b" ") + 1
            try:
                text = data[:end].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError("%s: byte %d, in line %d, is 0x%02x (%s), expected UTF-8 text. Convert the file, for instance "
                                 "with `iconv -f LATIN1 -t UTF-8`" % (
                                     path, offset + error.start, line_number + data.count(b"\n", 0, error.start),
                                     data[error.start], error.reason))
            if text:
                lines = text.split("\n")
                yield from map(str.strip, lines if lines[-1] else lines[:-1])
            if not block:
                return
            offset, line_number, rest = offset + end, line_number + data.count(b"\n", 0, end), data[end:]


def python_lines(on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The paragraphs of each topic of Python's manual, then of each module's docstrings; "" ends a topic and a module.

    A paragraph that many modules repeat comes once.
    """
    from pydoc_data.topics import topics  # half a megabyte of text that only this corpus needs

    seen = {""}

    def new(paragraphs):
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


def python_modules() -> List[str]:
    """The files of the standard library that hold documentation, sorted."""
    modules = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in NOT_PROSE_FOLDERS]
        modules += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(modules)


@functools.lru_cache(maxsize=None)
def docstring_prose(path: str) -> List[str]:
    """Cached, for parsing the whole library takes seconds and a vocabulary's training reads it once more."""
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
    paragraphs = [[word for word in paragraph.split() if not RULE.match(word)] for paragraph in re.split(r"\n\s*\n", text)]
    return [" ".join(words) for words in paragraphs
            if len(words) > 2 and words[0] != ">>>" and 2 * sum(map(bool, map(PLAIN_WORD.match, words))) >= len(words)]
