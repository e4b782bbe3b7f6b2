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
    *("sequence_length", "mask_tokens", "vocab_size", "vocab_sha256", "segments"),
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

    Raises InputError that names the file and what is wrong: missing, not HDF5 or truncated, a data set missing,
    compressed or of the wrong shape, another sequence length or number of masked tokens than the run's, a larger
    vocabulary, or shards that differ.
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
            raise InputError(
                f"{shard.path}: its {name} is {value:.12} and that of {first.path} is {other:.12}. Train on shards of "
                "one data set"
            )


def check_fits(
    shard: ShardInfo, sequence_length: Optional[int], mask_tokens: Optional[int], vocab_size: Optional[int]
) -> None:
    if sequence_length not in (None, shard.sequence_length):
        raise InputError(
            f"{shard.path}: its samples have sequence length {shard.sequence_length}, data.sequence_length is "
            f"{sequence_length}. Prepare the text again with --sequence-length {sequence_length}, or set "
            "data.sequence_length"
        )
    if mask_tokens not in (None, shard.mask_tokens):
        raise InputError(
            f"{shard.path}: its samples have room for {shard.mask_tokens} masked tokens, data.mask_tokens is "
            f"{mask_tokens}. Prepare the text again with --mask-tokens {mask_tokens}, or set data.mask_tokens"
        )
    if vocab_size is not None and shard.vocab_size > vocab_size:
        raise InputError(
            f"{shard.path}: was made with a vocabulary of {shard.vocab_size} tokens, model.vocab_size is "
            f"{vocab_size}. Set model.vocab_size to {shard.vocab_size}"
        )


def read_checked(shard: ShardInfo, start: int, stop: int, before: int) -> Samples:
    """The samples [start, stop) of a shard that `open_shards` opened, masked where that is to be done anew, as in epoch
    0 under seed 0.

    `before`: samples of the data set in the shards before it. Raises InputError that names the file and a sample that
    is not as it must be.
    """
    if shard.is_nvidia:
        return read_nvidia(shard.path, start, stop, shard.vocab_size)
    samples = read_samples(shard.path, start, stop)
    check_samples(samples, shard.vocab_size, shard.path, start)
    if shard.masking == "dynamic":
        numbers = before + np.arange(start, stop)
        samples = mask_dynamic(samples, numbers, 0, 0, masking_of(shard))
    return samples
