"""Samples on disk: the project's HDF5 shards.

A shard holds N samples in contiguous, uncompressed datasets (V is uint16 up to 65,536 words, else uint32):

    input_ids      [N, L] V        [CLS] first segment [SEP] second segment [SEP], then zeros; masking is already applied
    lengths        [N]    uint16   tokens in all
    first_lengths  [N]    uint16   tokens of the first segment, its [CLS] and [SEP] among them
    mlm_positions  [N, M] uint16   where tokens were masked, ascending; zeros after the last
    mlm_labels     [N, M] V        what stood there
    mlm_counts     [N]    uint16   masked tokens
    nsp_labels     [N]    uint8    1 = the second segment does not follow the first, as in BERT's own data

Attributes: format, schema_version, vocab_size, vocab_sha256, made_by (JSON: how the shard was made), and, where known, how it is
masked: masking and mask_share, special_ids and continuations. `FORMAT.md` has all of it.
"""

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import h5py
import numpy as np

from data.errors import InputError
from data.hdf5_file import new_hdf5

__all__ = ["FIELDS", "Samples", "ShardInfo", "check_samples", "find_bad_sample", "open_shards", "read_samples", "token_dtype",
           "vocab_sha256", "write_shard"]

FORMAT = "bert-pretraining-samples"
SCHEMA_VERSION = 1


@dataclass
class Samples:
    """N samples as arrays, laid out as in a shard (the module's docstring has shapes and types)."""

    input_ids: np.ndarray
    lengths: np.ndarray
    first_lengths: np.ndarray
    mlm_positions: np.ndarray
    mlm_labels: np.ndarray
    mlm_counts: np.ndarray
    nsp_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, index) -> "Samples":
        """The samples at `index`, in that order: views for a slice, copies for an integer array."""
        if isinstance(index, slice):
            return Samples(*[getattr(self, name)[index] for name in FIELDS])
        return Samples(*[np.take(getattr(self, name), index, axis=0) for name in FIELDS])

    @staticmethod
    def empty(count: int, sequence_length: int, mask_tokens: int, vocab_size: int) -> "Samples":
        """Room for `count` samples, uninitialised."""
        return Samples(**{name: np.empty((count,) + shape, dtype)
                          for name, (shape, dtype) in layout(sequence_length, mask_tokens, vocab_size).items()})

    @staticmethod
    def concatenate(parts: Sequence["Samples"]) -> "Samples":
        return Samples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


FIELDS = tuple(Samples.__dataclass_fields__)
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
    continuations: str = ""  # hexadecimal bits, one a word: whether it begins with ##; with dynamic masking of whole words only


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary: uint16 up to 65,536 words, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def vocab_sha256(words: Sequence[str]) -> str:
    """The hash that ties shards to the vocabulary they were made with: of its words, one a line."""
    return hashlib.sha256("\n".join(words).encode("utf-8")).hexdigest()


def layout(sequence_length: int, mask_tokens: int, vocab_size: int) -> Dict[str, Tuple[tuple, np.dtype]]:
    """Name -> (shape of one sample, type) of each dataset of a shard."""
    ids, small = token_dtype(vocab_size), np.dtype(np.uint16)
    return {
        "input_ids": ((sequence_length,), ids), "lengths": ((), small), "first_lengths": ((), small),
        "mlm_positions": ((mask_tokens,), small), "mlm_labels": ((mask_tokens,), ids), "mlm_counts": ((), small),
        "nsp_labels": ((), np.dtype(np.uint8)),
    }


def write_shard(path: str, samples: Samples, vocab_size: int, vocab_hash: str, made_by: Dict,
                masking: Optional[Dict] = None) -> None:
    """Writes one shard; the file appears under its name whole or not at all.

    `masking`: the attributes of how its samples are masked, or are to be (MASKING); without it the file does not say. Raises
    OSError that names the file when the disk is full.
    """
    temporary = "%s.tmp-%d" % (path, os.getpid())
    try:
        with new_hdf5(temporary) as file:
            file.attrs.update({"format": FORMAT, "schema_version": SCHEMA_VERSION, "vocab_size": vocab_size,
                               "vocab_sha256": vocab_hash, "made_by": json.dumps(made_by)})
            file.attrs.update(masking or {})
            for name in FIELDS:
                file.create_dataset(name, data=getattr(samples, name))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def expand(patterns: Sequence[str]) -> List[str]:
    """The files that paths and globs name, each once, in sorted order; a name without a match stays, for the error to name it."""
    return sorted({path for pattern in patterns for path in glob.glob(pattern) or [pattern]})


def open_shards(patterns: Sequence[str], sequence_length: Optional[int] = None, mask_tokens: Optional[int] = None,
                vocab_size: Optional[int] = None, skipped: Optional[Dict[str, str]] = None) -> List[ShardInfo]:
    """Opens every shard that `patterns` (paths and globs) name and checks that it is whole and fits the run.

    NVIDIA's HDF5 files are taken as they are (data/nvidia.py): their `vocab_sha256` is "", unknown, their `offsets` are empty.
    With `skipped`, files that are not whole are left out and noted there (path -> why), unless all are.

    Raises InputError that names the file and what is wrong: missing, not HDF5 or truncated, a data set missing, compressed or
    of the wrong shape, another sequence length or number of masked tokens than the run's, a larger vocabulary, or shards that
    differ.
    """
    from data.nvidia import is_nvidia, open_nvidia  # here, for it imports this module

    shards = []
    for path in expand(patterns):
        try:
            # Such a file does not say how large its vocabulary is: without the run's, all that its ids' type can hold.
            shards.append(open_nvidia(path, vocab_size or 65536) if is_nvidia(path) else inspect(path))
        except InputError as error:
            if skipped is None:
                raise
            skipped[path] = str(error)
    if not shards:
        raise InputError("every shard is bad: %s" % "; ".join(skipped.values()) if skipped else
                         "no shards are named: data.files is empty")
    if sum(shard.num_samples for shard in shards) == 0:
        raise InputError("%s: holds no samples" % ", ".join(shard.path for shard in shards))
    for shard in shards:
        first = shards[0]
        if kind(shard) != kind(first):
            raise InputError("%s: sequence length %d, %d masked tokens, %d words, vocabulary %.12s; %s has %d, %d, %d, %.12s. "
                             "Train on shards of one data set" % ((shard.path,) + kind(shard) + (first.path,) + kind(first)))
        if (shard.masking, shard.mask_share, shard.continuations) != (first.masking, first.mask_share, first.continuations):
            raise InputError("%s: its masking is %s with a share of %g, that of %s is %s with %g. Train on shards of one data "
                             "set" % (shard.path, shard.masking, shard.mask_share, first.path, first.masking, first.mask_share))
        if sequence_length is not None and shard.sequence_length != sequence_length:
            raise InputError("%s: its samples have sequence length %d, data.sequence_length is %d. Prepare the text again with "
                             "--sequence-length %d, or set data.sequence_length" % (
                                 shard.path, shard.sequence_length, sequence_length, sequence_length))
        if mask_tokens is not None and shard.mask_tokens != mask_tokens:
            raise InputError("%s: its samples have room for %d masked tokens, data.mask_tokens is %d. Prepare the text again "
                             "with --mask-tokens %d, or set data.mask_tokens" % (
                                 shard.path, shard.mask_tokens, mask_tokens, mask_tokens))
        if vocab_size is not None and shard.vocab_size > vocab_size:
            raise InputError("%s: was made with a vocabulary of %d words, model.vocab_size is %d. Set model.vocab_size to %d" % (
                shard.path, shard.vocab_size, vocab_size, shard.vocab_size))
    return shards


def kind(shard: ShardInfo) -> Tuple[int, int, int, str]:
    return shard.sequence_length, shard.mask_tokens, shard.vocab_size, shard.vocab_sha256


def inspect(path: str) -> ShardInfo:
    if not os.path.exists(path):
        raise InputError("%s: no such file" % path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError("%s: cannot be read as HDF5 (%s). It may be cut off: make it again" % (path, error))
    with file:
        found = file.attrs.get("format")
        if found != FORMAT or int(file.attrs.get("schema_version", 0)) != SCHEMA_VERSION:
            raise InputError("%s: format %r version %s, expected %r version %d. Make shards with `python -m data.prepare`" % (
                path, found, file.attrs.get("schema_version"), FORMAT, SCHEMA_VERSION))
        missing = [name for name in FIELDS if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise InputError("%s: the data set %r is missing; found %s, expected %s" % (
                path, missing[0], sorted(file), list(FIELDS)))
        missing = [name for name in ("vocab_size", "vocab_sha256") if name not in file.attrs]
        if missing:
            raise InputError("%s: the attribute %r is missing. Make it again with `python -m data.prepare`" % (path, missing[0]))
        if file["input_ids"].ndim != 2 or file["mlm_positions"].ndim != 2:
            raise InputError("%s: input_ids and mlm_positions must have 2 dimensions, found %d and %d" % (
                path, file["input_ids"].ndim, file["mlm_positions"].ndim))
        count, sequence_length = file["input_ids"].shape
        mask_tokens = file["mlm_positions"].shape[1]
        vocab_size = int(file.attrs["vocab_size"])
        for name, (shape, dtype) in layout(sequence_length, mask_tokens, vocab_size).items():
            if file[name].shape != (count,) + shape or file[name].dtype != dtype:
                raise InputError("%s: data set %r is %s %s, expected %s %s" % (
                    path, name, file[name].dtype, file[name].shape, dtype, (count,) + shape))
            if file[name].size and file[name].id.get_offset() is None:
                raise InputError("%s: data set %r is chunked or compressed, expected contiguous. Make it again with "
                                 "`python -m data.prepare`" % (path, name))
        return ShardInfo(path, count, sequence_length, mask_tokens, vocab_size, str(file.attrs["vocab_sha256"]),
                         os.path.getsize(path), tuple(file[name].id.get_offset() or 0 for name in FIELDS),
                         **masking_of(path, file.attrs))


def masking_of(path: str, attributes) -> Dict:
    """The fields of ShardInfo that say how a shard is masked. Raises InputError when dynamic masking lacks one."""
    found = {name: attributes[name] for name in MASKING if name in attributes}
    kind = found.get("masking", "static")
    if kind not in ("static", "dynamic"):
        raise InputError("%s: the attribute masking is %r, expected 'static' or 'dynamic'" % (path, kind))
    if kind == "static":
        return {"mask_share": float(found.get("mask_share", 0))}
    missing = [name for name in MASKING if name not in found]
    if missing:
        raise InputError("%s: the attribute %r is missing, which dynamic masking needs. Make it again with `python -m "
                         "data.prepare --masking dynamic`" % (path, missing[0]))
    return {"masking": kind, "mask_share": float(found["mask_share"]), "continuations": str(found["continuations"]),
            "special_ids": tuple(int(number) for number in found["special_ids"])}


def read_samples(path: str, start: int, stop: int) -> Samples:
    """The samples [start, stop) of one shard. Raises InputError that names the file when it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return Samples(**{name: file[name][start:stop] for name in FIELDS})
    except (OSError, KeyError) as error:
        raise InputError("%s: cannot read samples %d to %d (%s)" % (path, start, stop, error))


def check_samples(samples: Samples, vocab_size: int, path: str, first: int = 0) -> None:
    """Raises InputError that names a bad sample: ids beyond the vocabulary, lengths or positions beyond the sample.

    `path` and `first` (the index of the first sample in its file) are for the message.
    """
    bad = find_bad_sample(samples, vocab_size)
    if bad is not None:
        raise InputError("%s: sample %d: %s" % (path, first + bad[0], bad[1]))


def find_bad_sample(samples: Samples, vocab_size: int) -> Optional[Tuple[int, str]]:
    """The index of a bad sample and what is wrong with it, or None when all are good."""
    (_, sequence_length), (_, mask_tokens) = samples.input_ids.shape, samples.mlm_positions.shape
    lengths = samples.lengths
    checks = [
        ("input_ids", "below the vocabulary's %d" % vocab_size, samples.input_ids < vocab_size),
        ("mlm_labels", "below the vocabulary's %d" % vocab_size, samples.mlm_labels < vocab_size),
        ("lengths", "1 to %d tokens" % sequence_length, (lengths >= 1) & (lengths <= sequence_length)),
        ("first_lengths", "at most the sample's length", samples.first_lengths <= lengths),
        ("mlm_counts", "at most %d" % mask_tokens, samples.mlm_counts <= mask_tokens),
        # Those of unused slots too: they are zero, and the graph gathers at them all the same.
        ("mlm_positions", "below the sample's length", samples.mlm_positions < lengths[:, None]),
        ("nsp_labels", "0 or 1", samples.nsp_labels <= 1),
    ]
    for name, expected, good in checks:
        if not good.all():
            place = np.unravel_index(int(np.argmin(good)), good.shape)
            return int(place[0]), "%s%s is %d, expected %s" % (
                name, "".join("[%d]" % i for i in place[1:]), getattr(samples, name)[place], expected)
    return None
