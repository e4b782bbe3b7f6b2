"""Text files to documents, streamed: a document is a list of lines, each a sentence, a paragraph or a heading.

`PrepareOptions.format` says what the formats of a file are (`data.preparing.formats` recognises them). A file may be
compressed (`.gz`, `.zst`), and may be a URL (`data.preparing.remote`). The name `python` stands for a corpus without a
file (`data.preparing.python_prose`).
"""

import itertools
import json
from typing import Callable, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from data.errors import InputError
from data.preparing.python_prose import PYTHON, python_lines
from data.preparing.tables import csv_texts, parquet_texts, tsv_texts
from data.preparing.text_file import UTF_8, read_lines

__all__ = ["FORMATS", "TEXT", "Document", "TextFile", "documents", "is_title", "lines_of", "text_of"]

FORMATS = ("lines", "wikitext", "wikiextractor", "jsonl", "csv", "tsv", "parquet")

TEXT = "text"

# A longer document is handed on in parts, so that memory stays bounded for a book or a file without a blank line.
DOCUMENT_CHARACTERS = 1 << 20


class TextFile(NamedTuple):
    """A file of text and how to read it."""

    path: str
    format: str = "lines"
    encoding: str = UTF_8
    field: str = TEXT  # of jsonl and tables: what holds the text


class Document(NamedTuple):
    """A document, or a part of a long one: parts have the same `number` and follow each other."""

    number: int
    lines: List[str]


def documents(files: Sequence[TextFile], on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[Document]:
    """The documents of `files`, in order, numbered from 0. Lines are stripped and never empty.

    A document of more than a million characters comes in parts, each cut at a line's end. `on_bytes` is told how many
    bytes were read, of a compressed file the compressed ones. Raises InputError that names the file and the place in it
    of what is not in its encoding or format, lacks the field of the text, or cannot be decompressed.
    """
    number = -1
    for file in files:
        for begins, lines in split(lines_of(file, on_bytes)):
            number += begins
            yield Document(number, lines)


def lines_of(file: TextFile, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """The stripped lines of text of a file in any format; "" ends a document."""
    path, text_format, encoding, field = file
    if path == PYTHON:
        return python_lines(on_bytes)
    if text_format == "parquet":
        return lines_of_texts(parquet_texts(path, field, on_bytes))
    if text_format in ("csv", "tsv"):
        texts = csv_texts if text_format == "csv" else tsv_texts
        return lines_of_texts(texts(path, field, on_bytes, encoding))
    lines = read_lines(path, on_bytes, text_format != "jsonl", encoding)
    if text_format == "jsonl":
        return lines_of_texts(text_of(path, number, line, field) for number, line in enumerate(lines, 1) if line)
    if text_format == "wikitext":
        return wikitext_lines(lines)
    return wikiextractor_lines(lines) if text_format == "wikiextractor" else lines


def split(lines: Iterable[str]) -> Iterator[Tuple[bool, List[str]]]:
    """The documents, or parts of long ones; with each, whether a document begins with it."""
    part: List[str] = []
    characters, begins = 0, True
    for line in lines:
        if part and (not line or characters >= DOCUMENT_CHARACTERS):
            yield begins, part
            part, characters, begins = [], 0, False
        begins = begins or not line
        if line:
            part.append(line)
            characters += len(line)
    if part:
        yield begins, part


def wikitext_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of WikiText, headings without their signs; "" stands only before titles.

    A heading has a blank line, or the file's end, on either side: a formula such as `= 1 / 2 =` within a text is none.
    """
    before, line = "", ""
    for after in itertools.chain(lines, [""]):
        alone = not before and not after
        if alone and is_title(line):
            yield ""
        if line:
            yield heading_text(line) if alone and is_heading(line) else line
        before, line = line, after


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


def lines_of_texts(texts: Iterable[str]) -> Iterator[str]:
    """The lines of texts, each a document; "" ends one."""
    for text in texts:
        yield from filter(None, map(str.strip, text.split("\n")))
        yield ""


def text_of(path: str, number: int, line: str, field: str) -> str:
    """The text in line `number` of JSON lines. Raises InputError that names the line without one, and its fields."""
    try:
        value = json.loads(line)
    except ValueError as error:
        fault = f'is not JSON ({error}); expected an object with a "{field}" field on each line'
        raise InputError(f"{path}: line {number} {fault}")
    if not isinstance(value, dict):
        content = f"a JSON {type(value).__name__}"
    elif field not in value:
        content = f"the fields {sorted(value)}. Name the text's with --text-field"
    elif not isinstance(value[field], str):
        content = f"a {field} that is {json.dumps(value[field])[:40]}"
    else:
        return value[field].encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is JSON, but no text
    raise InputError(f'{path}: line {number} has no "{field}" field with a string; found {content}')
