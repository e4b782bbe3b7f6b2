"""Samples on disk: the project's HDF5 shards, whose format is in data/FORMAT.md."""

import glob
import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence

import h5py

from data.errors import InputError
from data.files import replacing
from data.hdf5_file import new_hdf5
from data.samples import FIELDS, Samples, layout

__all__ = ["FIRST_TOKENIZER", "ShardInfo", "expand", "open_shard", "read_samples", "write_shard"]

FORMAT = "bert-pretraining-samples"
SCHEMA_VERSION = 1
MAKE_AGAIN = "Make it again with `python -m data.prepare`"
# Shards that do not say how text was normalised were made when there was one way.
FIRST_TOKENIZER = json.dumps(
    {"lowercase": True, "strip_accents": True, "chinese_characters": True, "normalization": "none"}
)
MASKING = ("masking", "mask_share", "special_ids", "continuations")  # with dynamic masking all of them are there


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
    offsets: Sequence[int] = ()  # where in the file each data set begins, in the order of FIELDS; empty for NVIDIA's
    is_nvidia: bool = False  # an HDF5 file as NVIDIA's script writes it: data/foreign/nvidia.py reads it
    tokenizer: str = ""  # how text was normalised: Vocabulary.rules; "" when the file does not say
    segments: int = 2  # of a sample: 1 or 2
    masking: str = "static"  # or "dynamic": nothing is masked yet, the loader masks anew in each epoch
    mask_share: float = 0.0  # of the tokens that are to be masked, or were; 0 when the file does not say
    # The rest with dynamic masking only:
    masked_units: str = "tokens"  # what is masked together: a name in data.masking.CHOICES
    special_ids: Sequence[int] = ()  # of [PAD], [UNK], [CLS], [SEP] and [MASK]
    continuations: str = ""  # hexadecimal bits, one a token: whether it begins with ##; not for masked_units "tokens"


def write_shard(
    path: str,
    samples: Samples,
    vocab_size: int,
    vocab_hash: str,
    made_by: Mapping[str, Any],
    masking: Mapping[str, Any] = {},
    segments: int = 2,
    tokenizer: str = FIRST_TOKENIZER,
) -> None:
    """Writes one shard; the file appears under its name whole or not at all.

    `masking`: the attributes that say how its samples are, or are to be, masked (MASKING and masked_units).
    `segments`: of a sample, 1 or 2. `tokenizer`: how text was normalised, `Vocabulary.rules`. Raises OSError
    that names the file when the disk is full.
    """
    with replacing(path) as temporary, new_hdf5(temporary) as file:
        file.attrs.update(format=FORMAT, schema_version=SCHEMA_VERSION, vocab_size=vocab_size, vocab_sha256=vocab_hash)
        file.attrs.update({"made_by": json.dumps(made_by), "tokenizer": tokenizer, **masking})
        if segments != 2:
            file.attrs["segments"] = segments
        for name in FIELDS:
            file.create_dataset(name, data=getattr(samples, name))


def expand(patterns: Sequence[str]) -> List[str]:
    """The files that paths and globs name, each once, sorted; a name without a match stays, for an error to name it."""
    return sorted({path for pattern in patterns for path in glob.glob(pattern) or [pattern]})


def open_shard(path: str) -> ShardInfo:
    """Raises InputError that names the file when it is no whole shard of this project."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name the shards in it, such as '{os.path.join(path, 'train-*.h5')}'")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}). It may be cut off: make it again")
    with file:
        check_format(file, path)
        check_datasets(file, path)
        (count, length), (_, masks) = file["input_ids"].shape, file["mlm_positions"].shape
        vocab_size, vocab_hash = int(file.attrs["vocab_size"]), str(file.attrs["vocab_sha256"])
        offsets = tuple(file[name].id.get_offset() or 0 for name in FIELDS)
        fields = {"segments": int(file.attrs.get("segments", 2)), **read_masking(path, file.attrs)}
        fields["tokenizer"] = str(file.attrs.get("tokenizer", FIRST_TOKENIZER))
        size = os.path.getsize(path)
        return ShardInfo(path, count, length, masks, vocab_size, vocab_hash, size, offsets, **fields)


def check_format(file: h5py.File, path: str) -> None:
    name, version = file.attrs.get("format"), file.attrs.get("schema_version", 0)
    if name != FORMAT or int(version) != SCHEMA_VERSION:
        expected = f"{FORMAT!r} version {SCHEMA_VERSION}. Make shards with `python -m data.prepare`"
        raise InputError(f"{path}: format {name!r} version {version}, expected {expected}")
    for name in ("vocab_size", "vocab_sha256"):
        if name not in file.attrs:
            raise InputError(f"{path}: the attribute {name!r} is missing. {MAKE_AGAIN}")


def check_datasets(file: h5py.File, path: str) -> None:
    for name in FIELDS:
        if not isinstance(file.get(name), h5py.Dataset):
            raise InputError(f"{path}: the data set {name!r} is missing; found {sorted(file)}, expected {list(FIELDS)}")
    tokens, masks = file["input_ids"].shape, file["mlm_positions"].shape
    if (len(tokens), len(masks)) != (2, 2):
        dimensions = f"{len(tokens)} and {len(masks)}"
        raise InputError(f"{path}: input_ids and mlm_positions must have 2 dimensions, found {dimensions}")
    expected = layout(tokens[1], masks[1], int(file.attrs["vocab_size"]))
    for name, (sample_shape, dtype) in expected.items():
        data, shape = file[name], (tokens[0], *sample_shape)
        if data.shape != shape or data.dtype != dtype:
            raise InputError(f"{path}: data set {name!r} is {data.dtype} {data.shape}, expected {dtype} {shape}")
        if data.size and data.id.get_offset() is None:
            raise InputError(f"{path}: data set {name!r} is chunked or compressed, expected contiguous. {MAKE_AGAIN}")


def read_masking(path: str, attributes: Mapping) -> Dict[str, Any]:
    """The fields of ShardInfo that say how a shard is masked. Raises InputError when dynamic masking lacks one."""
    kind = attributes.get("masking", "static")
    if kind not in ("static", "dynamic"):
        raise InputError(f"{path}: the attribute masking is {kind!r}, expected 'static' or 'dynamic'")
    if kind == "static":
        return {"mask_share": float(attributes.get("mask_share", 0))}
    missing = [name for name in MASKING if name not in attributes]
    if missing:
        advice = MAKE_AGAIN.replace("prepare", "prepare --masking dynamic")
        raise InputError(f"{path}: the attribute {missing[0]!r} is missing, which dynamic masking needs. {advice}")
    continuations = str(attributes["continuations"])
    return {
        "masking": kind,
        "mask_share": float(attributes["mask_share"]),
        # Before there was this attribute, continuations were there for whole words only.
        "masked_units": str(attributes.get("masked_units", "words" if continuations else "tokens")),
        "special_ids": tuple(int(number) for number in attributes["special_ids"]),
        "continuations": continuations,
    }


def read_samples(path: str, start: int, stop: int) -> Samples:
    """The samples [start, stop) of one shard. Raises InputError that names the file when it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return Samples(**{name: file[name][start:stop] for name in FIELDS})
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot read samples {start} to {stop} ({error})")
