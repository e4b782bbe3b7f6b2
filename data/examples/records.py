"""Records of labelled files: rows of TSV, CSV and parquet, lines of JSON; and the tokens of their texts."""

import itertools
import json
import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from tokenizers import Encoding

from data.errors import InputError
from data.foreign.hub import import_pyarrow
from data.preparing.tables import csv_rows, tsv_rows
from data.preparing.text_file import read_lines
from data.shards import expand

__all__ = ["JSON_LINES", "Record", "Tokens", "existing", "join", "label_numbers", "names_of", "read_json_lines"]
__all__ += ["read_records", "stem_and_ending", "tokens_of"]

JSON_LINES = (".jsonl", ".json", ".ndjson")
CHUNK = 10_000  # texts that are tokenized at a time

Columns = Mapping[str, Sequence[str]]
"""What is read -> the names that its column may have."""


class Record(NamedTuple):
    """A row, and where it stands, for messages."""

    place: str
    values: Dict[str, Any]


def existing(patterns: Sequence[str]) -> List[str]:
    """The files that paths and globs name. Raises InputError for one that is not there."""
    paths = expand(patterns)
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; expected the labelled files that data.files names")
    return paths


def read_records(
    paths: Sequence[str],
    columns: Columns,
    header: Optional[Sequence[str]] = None,
    broken: Optional[List[str]] = None,
) -> List[Record]:
    """The records of all files, a row or a line each, with the values of these columns.

    TSV, CSV, parquet, and JSON lines, by the file's ending; any but parquet may end in .gz or .zst. `header`: the
    columns of a TSV whose first line is a row already. Places of a TSV's rows of another size than its first go to
    `broken`. Raises InputError that names the file: for such a row without that, a format that is not known, a column
    that is missing or null, a file without rows.
    """
    records: List[Record] = []
    for path in paths:
        rows, before = rows_of(path, header, broken), len(records)
        names = next(rows, ("", []))[1]
        if not names:
            raise InputError(f"{path}: is empty; expected the names of columns and a row for each example")
        chosen = {key: column_of(path, aliases, names) for key, aliases in columns.items()}
        places = {key: list(names).index(name) for key, name in chosen.items()}
        for place, row in rows:
            values = {key: row[number] for key, number in places.items()}
            empty = next((chosen[key] for key, value in values.items() if value is None), None)
            if empty is not None:
                raise InputError(f"{place}: {empty!r} is null, expected a value in each row")
            records.append(Record(place, values))
        if len(records) == before:
            raise InputError(f"{path}: has no rows; expected one for each example")
    return records


def names_of(path: str) -> List[str]:
    """The names of a file's columns; none of an empty file."""
    return list(next(rows_of(path, None), ("", []))[1])


def column_of(path: str, aliases: Sequence[str], names: Sequence[str]) -> str:
    found = next((name for name in aliases if name in names), None)
    if found is None:
        raise InputError(
            f"{path}: has no column {' or '.join(map(repr, aliases))}; found {', '.join(map(repr, names))}. Name the "
            "columns with task.text_columns and task.label_column"
        )
    return found


def rows_of(
    path: str, header: Optional[Sequence[str]], broken: Optional[List[str]] = None
) -> Iterator[Tuple[str, Sequence[Any]]]:
    """The names of the columns, then each row, with its place."""
    _, ending = stem_and_ending(path)
    if ending in (".tsv", ".csv"):
        source = path, lambda count: None, "utf-8-sig"
        rows = tsv_rows(*source, broken) if ending == ".tsv" else csv_rows(*source)
        first = next(rows, [])
        if header and len(first) == len(header) and not set(header) <= set(first):
            rows, first = itertools.chain([first], rows), list(header)
        yield "", first
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    elif ending in JSON_LINES:
        names: List[str] = []
        for place, line in read_json_lines(path):
            if not names:
                names = list(line)
                yield "", names
            missing = [name for name in names if name not in line]
            if missing:
                raise InputError(f"{place}: has no {missing[0]!r}, which the lines before it have; found {list(line)}")
            yield place, [line[name] for name in names]
    elif ending == ".parquet":
        pyarrow = import_pyarrow()
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: cannot be read as parquet ({error}). It may be cut off: get it again")
        yield "", table.column_names
        values = zip(*(column.to_pylist() for column in table.columns))
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(values, 1))
    else:
        raise InputError(f"{path}: ends in {ending or 'nothing'!r}, expected .tsv, .csv, .parquet or .jsonl")


def stem_and_ending(path: str) -> Tuple[str, str]:
    """As os.path.splitext, of the name without .gz or .zst."""
    stem, ending = os.path.splitext(path)
    return os.path.splitext(stem) if ending in (".gz", ".zst") else (stem, ending)


def read_json_lines(path: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """(its place, the object) of each line that is not blank. Raises InputError that names the line that is none."""
    for number, text in enumerate(read_lines(path, lambda count: None, cut_long=False), 1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise InputError(f"{path}: line {number} is {text[:40]!r}, expected a JSON object")
        yield f"{path}: line {number}", line


class Tokens(NamedTuple):
    """Texts as tokens, end to end."""

    ids: np.ndarray
    """[T] int32"""
    types: np.ndarray
    """[T] int32"""
    lengths: np.ndarray
    """[texts] int64"""
    cut: np.ndarray
    """[texts] bool, which were longer"""


def tokens_of(encode: Callable[[Sequence[Any]], Sequence[Encoding]], texts: Sequence[Any]) -> Tokens:
    """What `encode`, a tokenizer's encode_batch, gives of the texts."""
    parts = []
    for first in range(0, len(texts), CHUNK):
        found = encode(texts[first : first + CHUNK])
        lists = [encoding.ids for encoding in found]
        parts.append(
            Tokens(
                join(lists),
                join([encoding.type_ids for encoding in found]),
                np.fromiter(map(len, lists), np.int64, len(lists)),
                np.fromiter((bool(encoding.overflowing) for encoding in found), bool, len(lists)),
            )
        )
    return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts)))


def label_numbers(values: Sequence[str], labels: Sequence[str], place_of: Callable[[int], str]) -> np.ndarray:
    """[len(values)] int32, the numbers of labels; values may be numbers throughout. Raises InputError that names the
    place of the first that is neither."""
    numbers, found = {label: number for number, label in enumerate(labels)}, set(values)
    by_number = {str(number): number for number in range(len(labels))}
    named_by_numbers = any(map(str.isdecimal, labels))
    if not (named_by_numbers or found <= numbers.keys()) and found <= by_number.keys():  # as some of GLUE's files
        numbers = by_number
    wrong = next((number for number, value in enumerate(values) if value not in numbers), None)
    if wrong is not None:
        raise InputError(
            f"{place_of(wrong)}: the label is {values[wrong]!r}, expected one of {', '.join(labels)}, or their numbers "
            f"0 to {len(labels) - 1} throughout. Labels come from task.labels, or data.files"
        )
    return np.fromiter(map(numbers.__getitem__, values), np.int32, len(values))


def join(lists: Sequence[Sequence[Union[int, float]]], dtype: type = np.int32) -> np.ndarray:
    """One after the other."""
    return np.fromiter(itertools.chain.from_iterable(lists), dtype)
