"""Samples on disk: the project's HDF5 shards.

A shard holds N samples in contiguous, uncompressed datasets, one for each field of data/samples.py, of its shape and
type. Attributes: format, schema_version, vocab_size, vocab_sha256, made_by (JSON: how the shard was made), and, where
known, how it is masked: masking and mask_share, special_ids and continuations. `FORMAT.md` has all of it.
"""

import glob
import json
import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

import h5py

from data.errors import InputError
from data.files import replacing
from data.hdf5_file import new_hdf5
from data.samples import FIELDS, Samples, layout

__all__ = ["ShardInfo", "expand", "open_shard", "read_samples", "write_shard"]

FORMAT = "bert-pretraining-samples"


SCHEMA_VERSION = 1


MASKING = ("masking", "mask_share", "special_ids", "continuations")


@dataclass(frozen=True)
class ShardInfo:
    """A shard that was opened and found whole."""

    path: str
    num_samples: int
    sequence_length: int
    mask_tokens: int
    vocab_size: int
    vocab_sha256: str
    file_size: int  # bytes
    offsets: Sequence[int]  # where in the file each data set begins, in the order of FIELDS
    masking: str = "static"  # or "dynamic": nothing is masked yet, the loader masks anew in each epoch
    mask_share: float = 0.0  # of the tokens that are to be masked, or were; 0 when the file does not say
    special_ids: Sequence[int] = ()  # of [PAD], [UNK], [CLS], [SEP] and [MASK]; with dynamic masking only
    continuations: str = (
        ""  # hexadecimal bits, one a word: whether it begins with ##; with dynamic masking of whole words only
    )


def write_shard(
    path: str, samples: Samples, vocab_size: int, vocab_hash: str, made_by: Dict, masking: Optional[Dict] = None
) -> None:
    """Writes one shard; the file appears under its name whole or not at all.

    `masking`: the attributes of how its samples are masked, or are to be (MASKING); without it the file does not say.
    Raises OSError that names the file when the disk is full.
    """
    with replacing(path) as temporary, new_hdf5(temporary) as file:
        file.attrs.update(
            {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "vocab_size": vocab_size,
                "vocab_sha256": vocab_hash,
                "made_by": json.dumps(made_by),
            }
        )
        file.attrs.update(masking or {})
        for name in FIELDS:
            file.create_dataset(name, data=getattr(samples, name))


def expand(patterns: Sequence[str]) -> List[str]:
    """The files that paths and globs name, each once, in sorted order; a name without a match stays, for the error to
    name it."""
    return sorted({path for pattern in patterns for path in glob.glob(pattern) or [pattern]})


def open_shard(path: str) -> ShardInfo:
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}). It may be cut off: make it again")
    with file:
        found = file.attrs.get("format")
        if found != FORMAT or int(file.attrs.get("schema_version", 0)) != SCHEMA_VERSION:
            raise InputError(
                f"{path}: format {found!r} version {file.attrs.get('schema_version')}, expected {FORMAT!r} "
                f"version {SCHEMA_VERSION}. Make shards with `python -m data.prepare`"
            )
        missing = [name for name in FIELDS if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise InputError(
                f"{path}: the data set {missing[0]!r} is missing; found {sorted(file)}, expected {list(FIELDS)}"
            )
        missing = [name for name in ("vocab_size", "vocab_sha256") if name not in file.attrs]
        if missing:
            raise InputError(
                f"{path}: the attribute {missing[0]!r} is missing. Make it again with `python -m data.prepare`"
            )
        if file["input_ids"].ndim != 2 or file["mlm_positions"].ndim != 2:
            raise InputError(
                f"{path}: input_ids and mlm_positions must have 2 dimensions, found {file['input_ids'].ndim} "
                f"and {file['mlm_positions'].ndim}"
            )
        count, sequence_length = file["input_ids"].shape
        mask_tokens = file["mlm_positions"].shape[1]
        vocab_size = int(file.attrs["vocab_size"])
        for name, (shape, dtype) in layout(sequence_length, mask_tokens, vocab_size).items():
            if file[name].shape != (count,) + shape or file[name].dtype != dtype:
                raise InputError(
                    f"{path}: data set {name!r} is {file[name].dtype} {file[name].shape}, expected {dtype} "
                    f"{(count,) + shape}"
                )
            if file[name].size and file[name].id.get_offset() is None:
                raise InputError(
                    f"{path}: data set {name!r} is chunked or compressed, expected contiguous. Make it again "
                    "with `python -m data.prepare`"
                )
        return ShardInfo(
            path,
            count,
            sequence_length,
            mask_tokens,
            vocab_size,
            str(file.attrs["vocab_sha256"]),
            os.path.getsize(path),
            tuple(file[name].id.get_offset() or 0 for name in FIELDS),
            **masking_of(path, file.attrs),
        )


def masking_of(path: str, attributes) -> Dict:
    """The fields of ShardInfo that say how a shard is masked. Raises InputError when dynamic masking lacks one."""
    found = {name: attributes[name] for name in MASKING if name in attributes}
    kind = found.get("masking", "static")
    if kind not in ("static", "dynamic"):
        raise InputError(f"{path}: the attribute masking is {kind!r}, expected 'static' or 'dynamic'")
    if kind == "static":
        return {"mask_share": float(found.get("mask_share", 0))}
    missing = [name for name in MASKING if name not in found]
    if missing:
        raise InputError(
            f"{path}: the attribute {missing[0]!r} is missing, which dynamic masking needs. Make it again "
            "with `python -m data.prepare --masking dynamic`"
        )
    return {
        "masking": kind,
        "mask_share": float(found["mask_share"]),
        "continuations": str(found["continuations"]),
        "special_ids": tuple(int(number) for number in found["special_ids"]),
    }


def read_samples(path: str, start: int, stop: int) -> Samples:
    """The samples [start, stop) of one shard. Raises InputError that names the file when it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return Samples(**{name: file[name][start:stop] for name in FIELDS})
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot read samples {start} to {stop} ({error})")
