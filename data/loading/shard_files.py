"""Shards of any kind: this project's, and NVIDIA's as they are."""

from typing import Dict, List, Optional, Sequence

import numpy as np

from data.errors import InputError
from data.foreign.nvidia import is_nvidia, open_nvidia, read_nvidia
from data.masking import mask_dynamic, masking_of
from data.samples import Samples, check_samples
from data.shards import ShardInfo, expand, open_shard, read_samples

__all__ = ["open_shards", "read_checked"]

# What the shards of a data set have in common: fields of ShardInfo.
ALIKE = (
    *("sequence_length", "mask_tokens", "vocab_size", "vocab_sha256", "tokenizer", "segments"),
    *("masking", "mask_share", "masked_units", "continuations"),
)


def open_shards(
    patterns: Sequence[str],
    sequence_length: Optional[int] = None,
    mask_tokens: Optional[int] = None,
    vocab_size: Optional[int] = None,
    skipped: Optional[Dict[str, str]] = None,
) -> List[ShardInfo]:
    """Opens every shard that `patterns` (paths and globs) name and checks that it is whole and fits the run.

    NVIDIA's HDF5 files are taken as they are (data/foreign/nvidia.py): their `vocab_sha256` is "", unknown. With
    `skipped`, files that are not whole are left out and noted there (path -> why), unless all are.

    Raises InputError that names the file and what is wrong: it is missing, not HDF5 or truncated, lacks a data set or
    has a compressed one or one of the wrong shape, has another sequence length or number of masked tokens than the run
    or a larger vocabulary, or differs from the other shards.
    """
    shards = []
    for path in expand(patterns):
        try:
            # Such a file does not say how large its vocabulary is: without the run's, all that its ids' type can hold.
            shards.append(open_nvidia(path, vocab_size or 65536) if is_nvidia(path) else open_shard(path))
        except InputError as error:
            if skipped is None:
                raise
            skipped[path] = str(error)
    if not shards and skipped:
        raise InputError(f"every shard is bad: {'; '.join(skipped.values())}")
    if not shards:
        raise InputError("no shards are named: data.files is empty")
    if sum(shard.num_samples for shard in shards) == 0:
        raise InputError(f"{', '.join(shard.path for shard in shards)}: holds no samples")
    for shard in shards:
        check_alike(shard, shards[0])
        check_fits(shard, sequence_length, mask_tokens, vocab_size)
    return shards


def check_alike(shard: ShardInfo, first: ShardInfo) -> None:
    """Raises InputError for shards that are not of one data set."""
    for name in ALIKE:
        value, other = str(getattr(shard, name)), str(getattr(first, name))
        if value != other:
            longest = 12 if name == "vocab_sha256" else None
            values = f"its {name} is {value[:longest]} and that of {first.path} is {other[:longest]}"
            raise InputError(f"{shard.path}: {values}. Train on shards of one data set")


def check_fits(
    shard: ShardInfo, sequence_length: Optional[int], mask_tokens: Optional[int], vocab_size: Optional[int]
) -> None:
    for name, wanted, size in (
        ("sequence_length", sequence_length, f"sequence length {shard.sequence_length}"),
        ("mask_tokens", mask_tokens, f"room for {shard.mask_tokens} masked tokens"),
    ):
        if wanted not in (None, getattr(shard, name)):
            advice = f"Prepare the text again with --{name.replace('_', '-')} {wanted}, or set data.{name}"
            raise InputError(f"{shard.path}: its samples have {size}, data.{name} is {wanted}. {advice}")
    if vocab_size is not None and shard.vocab_size > vocab_size:
        sizes = f"a vocabulary of {shard.vocab_size} tokens, model.vocab_size is {vocab_size}"
        raise InputError(f"{shard.path}: was made with {sizes}. Set model.vocab_size to {shard.vocab_size}")


def read_checked(shard: ShardInfo, start: int, stop: int, before: int) -> Samples:
    """The samples [start, stop) of an opened shard; those with dynamic masking are masked as in epoch 0 under seed 0.

    `before`: samples of the data set in the shards before it. Raises InputError that names the file and the first
    sample that is not as it must be.
    """
    if shard.is_nvidia:
        return read_nvidia(shard.path, start, stop, shard.vocab_size)
    samples = read_samples(shard.path, start, stop)
    check_samples(samples, shard.vocab_size, shard.path, start)
    if shard.masking == "static":
        return samples
    return mask_dynamic(samples, before + np.arange(start, stop), 0, 0, masking_of(shard))
