"""The hub's layout of BERT samples, as Graphcore/wikipedia-bert-128 has it: parquet or Arrow files.

Shape letters: N samples, L sequence length, M mask slots.

Columns: lists of L integers `input_ids`, `attention_mask`, `token_type_ids` and `labels` (-100 where no token is
masked), and an integer `next_sentence_label` (1 = the second segment does not follow). pyarrow reads them and is
imported only then.
"""

import glob
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.files import read_json

__all__ = ["is_hub", "largest_mask_count", "read_hub", "table_files"]

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
NSP_COLUMN = "next_sentence_label"
COLUMNS = (*TOKEN_COLUMNS, NSP_COLUMN)
NOT_MASKED = -100
BATCH = 4096  # rows decoded at a time
STREAM, ARROW, PARQUET = b"\xff\xff\xff\xff", b"ARRO", b"PAR1"  # how files begin
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def table_files(path: str) -> List[str]:
    """The parquet or Arrow files of a folder, sorted, or those that its state.json names; of a file, itself.

    Hugging Face's `save_to_disk` writes state.json. Raises InputError for a folder that holds no such files.
    """
    if not os.path.isdir(path):
        return [path]
    state = os.path.join(path, "state.json")
    if os.path.exists(state):
        try:
            return [os.path.join(path, entry["filename"]) for entry in read_json(state)["_data_files"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{state}: is not the state.json of a data set that `save_to_disk` wrote ({error!r})")
    names = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    tables = sorted(name for name in names if name.endswith((".parquet", ".arrow")))
    if not tables:
        raise InputError(f"{path}: the folder holds no .parquet or .arrow files. Name the folder of a split, or files")
    return tables


def is_hub(path: str) -> bool:
    """Whether a file is parquet or Arrow, by how it begins."""
    with open(path, "rb") as file:
        return file.read(4) in (STREAM, ARROW, PARQUET)


def largest_mask_count(paths: Sequence[str], progress=iter) -> int:
    """The most masked tokens that a sample of these files has, at least 1. `progress` wraps the list."""
    most = 1
    for path in progress(paths):
        for table in tables(path, ("labels",)):
            most = max(most, int((table.lists("labels") != NOT_MASKED).sum(axis=1).max()))
    return most


def read_hub(path: str, mask_tokens: int) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """Yields (arrays in BERT's layout, see data/foreign/bert_layout.py; bytes of the file done), in batches.

    M is `mask_tokens`. Raises InputError that names the file and what is wrong: not parquet or Arrow, cut off, a column
    missing or not of lists of one length; pyarrow missing; a sample with more than M masked tokens.
    """
    for table in tables(path, COLUMNS):
        ids, mask, segments, labels = map(table.lists, TOKEN_COLUMNS)
        masked = labels != NOT_MASKED
        counts = masked.sum(axis=1)
        if counts.max() > mask_tokens:
            bad = int(np.argmax(counts > mask_tokens))
            excess = f"{counts[bad]} masked tokens, --mask-tokens is {mask_tokens}. Leave it out to make room for all"
            raise InputError(f"{path}: sample {table.first + bad} has {excess}")
        used = np.arange(mask_tokens) < counts[:, None]
        positions, mask_ids = np.zeros((2, *used.shape), np.int64)
        positions[used], mask_ids[used] = np.nonzero(masked)[1], labels[masked]
        arrays = {
            "input_ids": ids,
            "input_mask": mask,
            "segment_ids": segments,
            "masked_lm_positions": positions,
            "masked_lm_ids": mask_ids,
            "masked_lm_weights": used,
            "next_sentence_labels": table.integers(NSP_COLUMN, table.batch.column(NSP_COLUMN)),
        }
        yield arrays, table.done


class Table(NamedTuple):
    """Rows of a file: a pyarrow.RecordBatch of at least one, the first of which is number `first` of the file."""

    path: str
    batch: Any
    first: int
    done: int  # bytes of the file

    def lists(self, name: str) -> np.ndarray:
        """[N, L] of a column of lists."""
        column = self.batch.column(name)
        ragged = hasattr(column, "value_lengths")
        if not (ragged or hasattr(column.type, "list_size")) or column.null_count:
            actual = f"{column.type} with {column.null_count} nulls"
            raise InputError(f"{self.path}: the column {name!r} is {actual}, expected lists of integers")
        values = self.integers(name, column.flatten())
        lengths = column.value_lengths().to_numpy(zero_copy_only=False) if ragged else np.zeros(1)
        bad = int(np.argmax(lengths != lengths[0]))
        if bad:
            sizes = f"{name} has {lengths[bad]} values, sample {self.first} has {lengths[0]}"
            raise InputError(f"{self.path}: sample {self.first + bad}: {sizes}. Pad them to one length")
        return values.reshape(self.batch.num_rows, -1)

    def integers(self, name: str, column: Any) -> np.ndarray:
        if column.null_count or not str(column.type).lstrip("u").startswith("int"):
            actual = f"{column.type} with {column.null_count} nulls"
            raise InputError(f"{self.path}: the column {name!r} holds {actual}, expected integers")
        return column.to_numpy(zero_copy_only=False)


def tables(path: str, columns: Sequence[str]) -> Iterator[Table]:
    """The rows of a file, up to BATCH at a time."""
    pyarrow, first = import_pyarrow(), 0
    try:
        for batch, done in read_batches(pyarrow, path, columns):
            if batch.num_rows:
                yield Table(path, batch, first, done)
            first += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet or Arrow ({error}). It may be cut off: get it again")


def read_batches(pyarrow: Any, path: str, columns: Sequence[str]) -> Iterator[Tuple[Any, int]]:
    """Yields (pyarrow.RecordBatch, bytes of the file done)."""
    size, done = os.path.getsize(path), 0
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(-min(size, len(STREAM_END)), os.SEEK_END)
        end = file.read()
    if start == PARQUET:
        with pyarrow.parquet.ParquetFile(path) as file:
            need_columns(file.schema_arrow.names, columns, path)
            for batch in file.iter_batches(BATCH, columns=list(columns)):
                done += batch.num_rows
                yield batch, size * done // max(1, file.metadata.num_rows)
        return
    if start == STREAM and end != STREAM_END:  # which pyarrow would take for the end of the data
        raise InputError(f"{path}: is cut off: an Arrow stream's end mark is missing. Get it again")
    with pyarrow.OSFile(path) as file:  # not a memory map: cutting off a mapped file kills the process
        reader = pyarrow.ipc.open_file(file) if start == ARROW else pyarrow.ipc.open_stream(file)
        need_columns(reader.schema.names, columns, path)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if start == ARROW else reader:
            for begin in range(0, batch.num_rows, BATCH):
                yield batch.slice(begin, BATCH), min(size, file.tell())


def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading parquet and Arrow needs pyarrow ({error}): pip install 'pyarrow>=17'")
    return pyarrow


def need_columns(names: Sequence[str], columns: Sequence[str], path: str) -> None:
    for name in columns:
        if name not in names:
            raise InputError(f"{path}: the column {name!r} is missing; found {sorted(names)}, expected {list(COLUMNS)}")
