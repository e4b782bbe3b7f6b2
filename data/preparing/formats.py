"""In which format a file is, by its name and its first lines, and whether it is one that can be used."""

import itertools
import json
import logging
import re
from typing import List, Sequence

from data.errors import InputError
from data.preparing.corpus import TEXT, TextFile, is_title, lines_of
from data.preparing.finding import ending
from data.preparing.python_prose import PYTHON
from data.preparing.text_file import UTF_8, read_lines

__all__ = ["AUTO", "check_formats", "describe", "with_formats"]

logger = logging.getLogger(__name__)

AUTO = "auto"
FORMAT_OF_ENDING = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TABLES = ("csv", "tsv", "parquet")
FIRST_LINES = 100  # that are looked at
JSON_START = re.compile(r'(\[ *)?\{ *"|\["')  # of an array, or of an object over several lines
HTML_TAG = re.compile(
    r"<(!doctype html|/?(html|head|body|div|p|span|a|br|ul|ol|li|table|tr|td|th|h[1-6]|img|link|meta|script|style)\b)",
    re.IGNORECASE,
)


def with_formats(files: Sequence[str], text_format: str, encoding: str, field: str) -> List[TextFile]:
    """How to read each file; with `text_format` AUTO by its name, or else by its first lines."""

    def format_of(path: str) -> str:
        if text_format != AUTO or path == PYTHON:
            return text_format if path != PYTHON else "lines"
        return FORMAT_OF_ENDING.get(ending(path)) or recognised(first_lines(path, encoding))

    return [TextFile(path, format_of(path), encoding, field) for path in files]


def check_formats(files: Sequence[TextFile], given: str) -> None:
    """Refuses a file in another format than its own, by its name and its first lines; logs a warning for HTML and for
    JSON of another layout than an object a line.

    Raises InputError that names the file and the format to give; with `given` AUTO there is none to give.
    """
    for file in files:
        if file.path == PYTHON:
            continue
        named = FORMAT_OF_ENDING.get(ending(file.path), file.format)
        if named != file.format:
            name = "JSON lines" if named == "jsonl" else named
            own_format = f"is named as {name}, --format is {file.format}"
            raise InputError(f"{file.path}: {own_format}. Give --format {named}, or name it otherwise")
        if file.format in TABLES:
            lines = list(itertools.islice(filter(None, lines_of(file)), FIRST_LINES))
        else:
            lines = first_lines(file.path, file.encoding)
            check_first_lines(file, lines, given)
        warn_of_marks(file, lines)


def first_lines(path: str, encoding: str) -> List[str]:
    """From the first that is not blank on."""
    lines = read_lines(path, lambda count: None, encoding=encoding)
    return list(itertools.islice(itertools.dropwhile(lambda line: not line, lines), FIRST_LINES))


def recognised(lines: Sequence[str]) -> str:
    if not lines:
        return "lines"
    if is_json_object(lines[0]):
        return "jsonl"
    if lines[0].startswith("<doc "):
        return "wikiextractor"
    return "wikitext" if is_title(lines[0]) and not any(lines[1:2]) else "lines"


def check_first_lines(file: TextFile, lines: Sequence[str], given: str) -> None:
    if not lines:
        return
    line, begins, right = lines[0], "", file.format
    if is_json_object(line) and file.field in json.loads(line):
        begins, right = f'a JSON object with the field "{file.field}"', "jsonl"
    elif line.startswith("<doc "):
        begins, right = "a <doc ...> line", "wikiextractor"
    elif file.format == "wikiextractor":
        begins, right = f"{line[:40]!r}, not with a <doc ...> line", "wikitext" if is_title(line) else "lines"
    if right != file.format:
        raise InputError(f"{file.path}: begins with {begins}, --format is {given}. Give --format {right}")


def is_json_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def warn_of_marks(file: TextFile, lines: Sequence[str]) -> None:
    path, texts = file.path, list(filter(None, lines))
    if file.format == "lines" and JSON_START.match("".join(texts[:3])):
        advice = "Write one object a line first, for instance with jq -c '.[]', and name it .jsonl"
        logger.warning("%s: looks like JSON, whose keys and marks would be learned as words. %s", path, advice)
    tagged = sum(HTML_TAG.search(line) is not None for line in texts)
    if 2 * tagged > len(texts):
        logger.warning(
            "%s: looks like HTML: %d of its first %d lines have tags, which would be learned as words. Extract its "
            "text first, for instance with trafilatura or html2text",
            *(path, tagged, len(texts)),
        )


def describe(files: Sequence[TextFile]) -> str:
    """The formats of files, and the field and the encoding where they are not the usual ones."""
    formats = {file.format for file in files}
    field, encoding = files[0].field, files[0].encoding
    of = f" of {field!r}" if field != TEXT and formats & {"jsonl", *TABLES} else ""
    return ", ".join(sorted(formats)) + of + (f" in {encoding}" if encoding != UTF_8 else "")
