"""Text files to documents, streamed: a document is a list of lines, each a sentence, a paragraph or a heading.

`PrepareOptions.format` says what the formats of a file are. A file is UTF-8, may be compressed (`.gz`, `.zst`), and
may be a URL (`data.preparing.remote`). The name `python` stands for a corpus without a file
(`data.preparing.python_prose`).
"""

import glob
import json
import os
from itertools import islice
from typing import Callable, Iterable, Iterator, List, NamedTuple, Sequence, Set, Tuple

from data.errors import InputError
from data.preparing.python_prose import PYTHON, python_bytes, python_lines
from data.preparing.remote import base_name, find_remote, is_url, remote_size
from data.preparing.text_file import read_lines

__all__ = ["FORMATS", "Document", "check_formats", "corpus_bytes", "documents", "file_bytes", "find_files"]

FORMATS = ("lines", "wikitext", "wikiextractor", "jsonl")

# A longer document is handed on in parts, so that memory stays bounded for a book or a file without a blank line.
DOCUMENT_CHARACTERS = 1 << 20


class Document(NamedTuple):
    """A document, or a part of a long one: parts have the same `number` and follow each other."""

    number: int
    lines: List[str]


def find_files(inputs: Sequence[str]) -> List[str]:
    """The files that paths, URLs and globs of them name, each once, sorted; `python` stays as it is.

    Raises InputError that names the input for which there is no file.
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
                f"{name}: no file matches; --input takes text files, URLs, globs in quotes such as 'corpus/*.txt', "
                f"or {PYTHON!r} for the prose of Python's own manual"
            )
        files.update(matches)
    for path in sorted(path for path in files - {PYTHON} if not is_url(path)):
        if not os.path.isfile(path):
            pattern = os.path.join(path, "*.txt")
            raise InputError(f"{path}: is not a file; name the text files in it, such as {pattern!r}")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: may not be read; give yourself the right to, with `chmod +r`")
    if not files:
        raise InputError(f"no input is named; --input takes text files, globs or {PYTHON!r}")
    return sorted(files)


def corpus_bytes(files: Sequence[str]) -> int:
    """How many bytes `documents` reports to `on_bytes` for these files, in all."""
    return sum(map(file_bytes, files))


def file_bytes(path: str) -> int:
    if path == PYTHON:
        return python_bytes()
    return remote_size(path) if is_url(path) else os.path.getsize(path)


def check_formats(files: Sequence[str], text_format: str) -> None:
    """Refuses a file in another format than `text_format`, by its name and by its first line that is not blank.

    Raises InputError that names the file and the format to give.
    """
    for path in files:
        if path == PYTHON:
            continue
        name = base_name(path)
        name = os.path.splitext(name)[0] if name.endswith((".gz", ".zst")) else name
        if name.endswith((".jsonl", ".ndjson")) and text_format != "jsonl":
            own_format = f"is named as JSON lines, --format is {text_format}"
            raise InputError(f"{path}: {own_format}. Give --format jsonl, or name it otherwise")
        for line in islice(filter(None, read_lines(path, lambda count: None)), 1):
            check_first_line(path, line, text_format)


def check_first_line(path: str, line: str, text_format: str) -> None:
    begins, right = "", text_format
    if is_json_text(line):
        begins, right = 'a JSON object with the field "text"', "jsonl"
    elif line.startswith("<doc "):
        begins, right = "a <doc ...> line", "wikiextractor"
    elif text_format == "wikiextractor":
        begins, right = f"{line[:40]!r}, not with a <doc ...> line", "wikitext" if is_title(line) else "lines"
    if right != text_format:
        raise InputError(f"{path}: begins with {begins}, --format is {text_format}. Give --format {right}")


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

    A document of more than a million characters comes in parts, each cut at a line's end. `on_bytes` is told how many
    bytes were read, of a compressed file the compressed ones. Raises InputError that names the file and the place in it
    of what is not UTF-8, not JSON, without the field `text`, or cannot be decompressed.
    """
    number = -1
    for path in files:
        wikitext = text_format == "wikitext" and path != PYTHON
        for begins, lines in split(lines_of(path, text_format, on_bytes), wikitext):
            number += begins
            yield Document(number, lines)


def lines_of(path: str, text_format: str, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The stripped lines of text of a file in any format; "" ends a document where titles do not."""
    if path == PYTHON:
        return python_lines(on_bytes)
    lines = read_lines(path, on_bytes, cut_long=text_format != "jsonl")
    if text_format == "jsonl":
        return jsonl_lines(path, lines)
    return wikiextractor_lines(lines) if text_format == "wikiextractor" else lines


def split(lines: Iterable[str], wikitext: bool) -> Iterator[Tuple[bool, List[str]]]:
    """The documents, or parts of long ones; with each, whether a document begins with it."""
    part: List[str] = []
    characters, begins = 0, True
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
        fault = f'is not JSON ({error}); expected an object with a "text" field on each line'
        raise InputError(f"{path}: line {number} {fault}")
    if not isinstance(value, dict):
        content = f"a JSON {type(value).__name__}"
    elif "text" not in value:
        content = f"the fields {sorted(value)}"
    elif not isinstance(value["text"], str):
        content = f"a text that is {json.dumps(value['text'])[:40]}"
    else:
        return value["text"].encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is JSON, but no text
    raise InputError(f'{path}: line {number} has no "text" field with a string; found {content}')
