"""The hub's layout of BERT samples, as Graphcore/wikipedia-bert-128 has it: parquet files, or a folder of
`save_to_disk`.

Shape letters: N samples, L sequence length, M mask slots.

Columns: lists of L integers `input_ids`, `attention_mask`, `token_type_ids` and `labels` (-100 where no token is
masked), and an integer `next_sentence_label` (1 = the second segment does not follow). pyarrow reads them and is
imported only then.
"""

import glob
import json
import os
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np

from data.errors import InputError

__all__ = ["is_hub", "largest_mask_count", "read_hub", "table_files"]

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
NSP_COLUMN = "next_sentence_label"
NOT_MASKED = -100
BATCH = 4096  # rows decoded at a time
STREAM, ARROW, PARQUET = b"\xff\xff\xff\xff", b"ARRO", b"PAR1"  # how files begin
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def table_files(path: str) -> List[str]:
    """The parquet or Arrow files of a folder (those its state.json names, if it has one), sorted; of a file, itself.

    Raises InputError for a folder that holds none.
    """
    if not os.path.isdir(path):
        return [path]
    state = os.path.join(path, "state.json")
    if os.path.exists(state):
        try:
            with open(state, encoding="utf-8") as file:
                return [os.path.join(path, entry["filename"]) for entry in json.load(file)["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{state}: is not the state.json of a data set that `save_to_disk` wrote ({error})")
    found = sorted(
        name
        for pattern in ("*.parquet", "*.arrow")
        for name in glob.glob(os.path.join(glob.escape(path), "**", pattern), recursive=True)
    )
    if not found:
        raise InputError(f"{path}: the folder holds no .parquet or .arrow files. Name the folder of a split, or files")
    return found


def is_hub(path: str) -> bool:
    """Whether a file is parquet or Arrow, by how it begins."""
    with open(path, "rb") as file:
        return file.read(4) in (STREAM, ARROW, PARQUET)


def largest_mask_count(paths: Sequence[str], progress=iter) -> int:
    """The most masked tokens that a sample of these files has, at least 1; reads their `labels`. `progress` wraps the
    list."""
    most = 1
    for path in progress(paths):
        first = 0
        for batch, _ in batches(path, ["labels"]):
            labels = list_column(batch, "labels", path, first)
            most = max(most, int((labels != NOT_MASKED).sum(axis=1).max()))
            first += len(labels)
    return most


def read_hub(path: str, mask_tokens: int) -> Iterator[Tuple[Dict[str, np.ndarray], int]]:
    """Yields (arrays in BERT's layout, see `data.foreign.bert_layout`, with M = mask_tokens; bytes of the file done),
    block by block.

    Raises InputError that names the file and what is wrong: not parquet or Arrow, cut off, a column missing or not of
    lists of one length; pyarrow missing; a sample with more masked tokens than `mask_tokens`.
    """
    first = 0
    for batch, place in batches(path, list(TOKEN_COLUMNS) + [NSP_COLUMN]):
        columns = {name: list_column(batch, name, path, first) for name in TOKEN_COLUMNS}
        positions, labels, weights = masked_slots(columns["labels"], mask_tokens, path, first)
        yield (
            {
                "input_ids": columns["input_ids"],
                "input_mask": columns["attention_mask"],
                "segment_ids": columns["token_type_ids"],
                "masked_lm_positions": positions,
                "masked_lm_ids": labels,
                "masked_lm_weights": weights,
                "next_sentence_labels": integers(batch.column(NSP_COLUMN), NSP_COLUMN, path),
            },
            place,
        )
        first += batch.num_rows


def masked_slots(
    labels: np.ndarray, mask_tokens: int, path: str, first: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, labels and weights [N, M] from labels [N, L] that are NOT_MASKED where no token is masked."""
    masked = labels != NOT_MASKED
    counts = masked.sum(axis=1)
    if counts.max() > mask_tokens:
        bad = int(np.argmax(counts > mask_tokens))
        raise InputError(
            f"{path}: sample {first + bad} has {counts[bad]} masked tokens, --mask-tokens is {mask_tokens}. "
            "Leave it out to make room for all"
        )
    row, position = np.nonzero(masked)
    slot = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    found = np.zeros((3, len(labels), mask_tokens), np.int64)
    found[0, row, slot], found[1, row, slot], found[2, row, slot] = position, labels[row, position], 1
    return found[0], found[1], found[2]


def batches(path: str, columns: List[str]) -> Iterator[tuple]:
    """Yields (pyarrow.RecordBatch of at least one row, bytes of the file done)."""
    pyarrow, parquet = import_pyarrow()
    done = 0
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(-min(size, len(STREAM_END)), os.SEEK_END)
            end = file.read()
        if start == PARQUET:
            with parquet.ParquetFile(path) as file:
                need_columns(file.schema_arrow.names, columns, path)
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(BATCH, columns=columns):
                    done += batch.num_rows
                    if batch.num_rows:
                        yield batch, size * done // total
        else:
            if start == STREAM and end != STREAM_END:  # which pyarrow would take for the end of the data
                raise InputError(f"{path}: is cut off: an Arrow stream's end mark is missing. Get it again")
            with pyarrow.OSFile(path) as file:  # not a memory map: cutting off a mapped file kills the process
                reader = pyarrow.ipc.open_file(file) if start == ARROW else pyarrow.ipc.open_stream(file)
                need_columns(reader.schema.names, columns, path)
                whole = map(reader.get_batch, range(reader.num_record_batches)) if start == ARROW else reader
                for batch in whole:
                    for begin in range(0, batch.num_rows, BATCH):
                        yield batch.slice(begin, BATCH), min(size, file.tell())
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet or Arrow ({error}). It may be cut off: get it again")


def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading parquet and Arrow needs pyarrow ({error}): pip install 'pyarrow>=17'")
    return pyarrow, pyarrow.parquet


def need_columns(found: Sequence[str], columns: Sequence[str], path: str) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise InputError(
            f"{path}: the column {missing[0]!r} is missing; found {sorted(found)}, expected "
            f"{list(TOKEN_COLUMNS) + [NSP_COLUMN]}"
        )


def list_column(batch, name: str, path: str, first: int) -> np.ndarray:
    """[N, L] of a column of lists."""
    column = batch.column(name)
    if not (hasattr(column, "value_lengths") or hasattr(column.type, "list_size")) or column.null_count:
        raise InputError(
            f"{path}: the column {name!r} is {column.type} with {column.null_count} nulls, expected lists of integers"
        )
    values = integers(column.flatten(), name, path)
    if hasattr(column, "value_lengths"):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != lengths[0]).any():
            bad = int(np.argmax(lengths != lengths[0]))
            raise InputError(
                f"{path}: sample {first + bad}: {name} has {lengths[bad]} values, sample {first} has "
                f"{lengths[0]}. Pad them to one length"
            )
    return values.reshape(batch.num_rows, -1)


def integers(column, name: str, path: str) -> np.ndarray:
    if column.null_count or not str(column.type).lstrip("u").startswith("int"):
        raise InputError(
            f"{path}: the column {name!r} holds {column.type} with {column.null_count} nulls, expected integers"
        )
    return column.to_numpy(zero_copy_only=False)
