"""Rows of tables to texts, streamed: CSV, tab-separated values, parquet. Each row has a text in one of its columns."""

import csv
import io
import os
from typing import Any, Callable, Iterator, List, Optional, Sequence

from data.errors import InputError
from data.foreign.hub import import_pyarrow
from data.preparing.remote import is_url, open_remote, remote_size
from data.preparing.text_file import read_text

__all__ = ["csv_rows", "csv_texts", "parquet_texts", "tsv_rows", "tsv_texts"]

SEPARATORS = ",;\t"
FIELD_CHARACTERS = 1 << 28  # a field that is longer is taken for a quote that is not closed
ROWS = 256  # of parquet, decoded at a time

OnBytes = Callable[[int], object]


def csv_texts(path: str, field: str, on_bytes: OnBytes, encoding: str) -> Iterator[str]:
    """The column `field` of each row of `csv_rows`. Raises InputError where it is missing, too."""
    return column(path, field, csv_rows(path, on_bytes, encoding))


def tsv_texts(path: str, field: str, on_bytes: OnBytes, encoding: str) -> Iterator[str]:
    """The same of `tsv_rows`."""
    return column(path, field, tsv_rows(path, on_bytes, encoding))


def column(path: str, field: str, rows: Iterator[List[str]]) -> Iterator[str]:
    names = next(rows, [])
    place = column_of(path, field, names) if names else 0
    for row in rows:
        yield row[place]


def csv_rows(path: str, on_bytes: OnBytes, encoding: str) -> Iterator[List[str]]:
    """The rows that are not blank. The first names the columns; they are separated by the comma, semicolon or tab,
    whichever its line has most of. Fields in double quotes may hold separators and line ends.

    Raises InputError that names the file and the line, for a row of another size than the first, and quotes that are
    not closed or not doubled in a field.
    """
    pieces = read_text(path, on_bytes, False, encoding)
    first = next(pieces, "")
    separator = max(SEPARATORS, key=next(filter(str.strip, first.splitlines()), "").count)
    return table_rows(path, with_first(first, pieces), None, delimiter=separator, strict=True)


def tsv_rows(path: str, on_bytes: OnBytes, encoding: str, broken: Optional[List[str]] = None) -> Iterator[List[str]]:
    """As `csv_rows`, of columns that tabs separate and that no quotes enclose: a quote is text, as in GLUE's files.
    Rows of another size than the first are left out where their places go to `broken`."""
    pieces = read_text(path, on_bytes, False, encoding)
    return table_rows(path, pieces, broken, delimiter="\t", quoting=csv.QUOTE_NONE)


def with_first(first: str, pieces: Iterator[str]) -> Iterator[str]:
    yield first
    yield from pieces


def table_rows(path: str, pieces: Iterator[str], broken: Optional[List[str]], **dialect: Any) -> Iterator[List[str]]:
    csv.field_size_limit(FIELD_CHARACTERS)
    rows = csv.reader((line for piece in pieces for line in io.StringIO(piece, newline="")), **dialect)
    size = 0
    try:
        for row in filter(None, rows):
            if len(row) != (size or len(row)) and broken is not None:
                broken.append(f"{path}: line {rows.line_num}")
                continue
            if len(row) != (size or len(row)):
                sizes = f"has {len(row)} columns, expected {size} as in the first line"
                raise InputError(f"{path}: the row that ends in line {rows.line_num} {sizes}")
            size = len(row)
            yield row
    except csv.Error as error:
        raise InputError(
            f"{path}: line {rows.line_num} is not as expected ({error}). A quote in a field that is quoted is written "
            "twice; --format tsv takes quotes as text"
        )


def column_of(path: str, field: str, names: Sequence[str]) -> int:
    if field not in names:
        columns = ", ".join(map(repr, names))
        raise InputError(f"{path}: has no column {field!r}; found {columns}. Name the text's with --text-field")
    return list(names).index(field)


def parquet_texts(path: str, field: str, on_bytes: OnBytes) -> Iterator[str]:
    """The column `field` of each row that has a text there. `on_bytes` is told a share of the file's bytes.

    Raises InputError that names the file: not parquet, no such column, a column of something else than text; pyarrow
    missing.
    """
    pyarrow, remote = import_pyarrow(), is_url(path)
    size, rows, told = remote_size(path) if remote else os.path.getsize(path), 0, 0
    try:
        with open_remote(path) if remote else open(path, "rb") as source:
            table = pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
            column_of(path, field, table.schema_arrow.names)
            kind = table.schema_arrow.field(field).type
            if not is_text(pyarrow, kind):
                raise InputError(f"{path}: the column {field!r} is of {kind}, expected text (string)")
            for batch in table.iter_batches(ROWS, columns=[field]):
                yield from filter(None, batch.column(0).to_pylist())
                rows += batch.num_rows
                done = size * rows // table.metadata.num_rows
                on_bytes(done - told)
                told = done
        on_bytes(size - told)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet ({error}). It may be cut off: get it again")


def is_text(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)
