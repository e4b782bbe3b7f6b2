"""Text files to documents, streamed: a document is a list of lines, each a sentence, a paragraph or a heading.

Formats of a text file (UTF-8):

    lines      documents end at blank lines, as in BERT's own data
    wikitext   documents begin at `= Title =` lines, as in WikiText. Headings of all levels stay as lines of their own,
    without
               their `=` signs; text before the first title is a document of its own
    wikiextractor   a document is what is between `<doc ...>` and `</doc>`, as WikiExtractor writes it
    jsonl      a JSON object a line, its field `text` a document, as of WikiExtractor's --json. Blank lines in it end
    none

A file may be packed: `.gz`, `.zst`.

The name `python` stands for a corpus that needs no file: the English prose that every Python brings, which is its
manual's topics and the standard library's docstrings, each topic and each module a document and each paragraph a line.
"""

import ast
import functools
import glob
import json
import os
import re
import sysconfig
import warnings
from typing import Callable, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from data.errors import InputError
from data.preparing.text_file import read_lines

__all__ = ["FORMATS", "PYTHON", "Document", "check_formats", "corpus_bytes", "documents", "find_files"]

FORMATS = ("lines", "wikitext", "wikiextractor", "jsonl")
PYTHON = "python"

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
            raise InputError(
                f"{name}: no file matches; --input takes text files, globs in quotes such as 'corpus/*.txt', "
                f"or {PYTHON!r} for the prose of Python's own manual"
            )
        found.update(matches)
    for path in sorted(found - {PYTHON}):
        if not os.path.isfile(path):
            raise InputError(
                f"{path}: is not a file; name the text files in it, such as {os.path.join(path, '*.txt')!r}"
            )
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: may not be read; give yourself the right to, with `chmod +r`")
    if not found:
        raise InputError(f"no input is named; --input takes text files, globs or {PYTHON!r}")
    return sorted(found)


def corpus_bytes(files: Sequence[str]) -> int:
    """How many bytes `documents` reports to `on_bytes` for these files, in all."""
    return sum(
        sum(map(os.path.getsize, python_modules())) if path == PYTHON else os.path.getsize(path) for path in files
    )


def check_formats(files: Sequence[str], text_format: str) -> None:
    """Refuses what would be read in another format than it is in, by its name and by the first line that is not blank.

    Raises InputError that names the file and the format to give.
    """
    for path in files:
        if path == PYTHON:
            continue
        name = path[: -len(".gz")] if path.endswith(".gz") else path[: -len(".zst")] if path.endswith(".zst") else path
        if name.endswith((".jsonl", ".ndjson")) and text_format != "jsonl":
            raise InputError(
                f"{path}: is named as JSON lines, --format is {text_format}. Give --format jsonl, or name it otherwise"
            )
        line = next(filter(None, read_lines(path, lambda count: None)), None)
        if line is None:
            continue
        for found, mark, good in (
            ("jsonl", 'a JSON object with the field "text"', is_json_text(line)),
            ("wikiextractor", "a <doc ...> line", line.startswith("<doc ")),
        ):
            if good and text_format != found:
                raise InputError(f"{path}: begins with {mark}, --format is {text_format}. Give --format {found}")
        if text_format == "wikiextractor" and not line.startswith("<doc "):
            raise InputError(
                f"{path}: begins with {line[:40]!r}, --format is wikiextractor, expected a <doc ...> line. "
                f"Give --format {'wikitext' if is_title(line) else 'lines'}"
            )


def is_json_text(line: str) -> bool:
    try:
        value = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return False
    return isinstance(value, dict) and "text" in value


def documents(
    files: Sequence[str], text_format: str = "lines", on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[Document]:
    """The documents of `files` (from `find_files`), in order, numbered from 0. Lines are stripped and never empty.

    A document of more than a million characters comes in parts, each cut at a line's end. `on_bytes` is told the bytes
    as they are read, of a packed file the packed ones. Raises InputError that names the file and the place in it of
    what is not UTF-8, not JSON, without the field `text`, or not to be unpacked.
    """
    number = -1
    for path in files:
        if path == PYTHON:
            parts = split(python_lines(on_bytes), "lines")
        else:
            parts = split(lines_of(path, text_format, on_bytes), text_format)
        for begins, lines in parts:
            number += begins
            yield Document(number, lines)


def lines_of(path: str, text_format: str, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The stripped lines of a file in any format, those that are no text taken out."""
    if text_format == "jsonl":
        return jsonl_lines(path, read_lines(path, on_bytes, cut_long=False))
    lines = read_lines(path, on_bytes)
    return wikiextractor_lines(lines) if text_format == "wikiextractor" else lines


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


def wikiextractor_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of WikiExtractor's `<doc ...>` elements; "" stands only between documents."""
    for line in lines:
        if line == "</doc>" or (line.startswith("<doc ") and line.endswith(">")):
            yield ""
        elif line:
            yield line


def jsonl_lines(path: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines of each object's `text`; "" ends a document."""
    for number, line in enumerate(lines, 1):
        if line:
            yield from filter(None, map(str.strip, text_field(path, number, line).split("\n")))
            yield ""


def text_field(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(
            f'{path}: line {number} is not JSON ({error}); expected an object with a "text" field on each line'
        )
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        found = f"the fields {sorted(value)}" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
        if isinstance(value, dict) and "text" in value:
            found = f"a text that is {json.dumps(value['text'])[:40]}"
        raise InputError(f'{path}: line {number} has no "text" field with a string; found {found}')
    # Half of a surrogate pair can be written in JSON, but is no text.
    return value["text"].encode("utf-8", "replace").decode("utf-8")


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
    paragraphs = [
        [word for word in paragraph.split() if not RULE.match(word)] for paragraph in re.split(r"\n\s*\n", text)
    ]
    return [
        " ".join(words)
        for words in paragraphs
        if len(words) > 2 and words[0] != ">>>" and 2 * sum(map(bool, map(PLAIN_WORD.match, words))) >= len(words)
    ]
