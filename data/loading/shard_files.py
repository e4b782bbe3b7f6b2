"""Shards of any kind: this project's, and NVIDIA's as they are."""

from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from data.errors import InputError
from data.foreign.nvidia import is_nvidia, open_nvidia, read_nvidia
from data.masking import mask_dynamic, mask_words_of
from data.samples import Samples, check_samples
from data.shards import ShardInfo, expand, open_shard, read_samples

__all__ = ["open_shards", "read_checked"]


def open_shards(
    patterns: Sequence[str],
    sequence_length: Optional[int] = None,
    mask_tokens: Optional[int] = None,
    vocab_size: Optional[int] = None,
    skipped: Optional[Dict[str, str]] = None,
) -> List[ShardInfo]:
    """Opens every shard that `patterns` (paths and globs) name and checks that it is whole and fits the run.

    NVIDIA's HDF5 files are taken as they are (data/foreign/nvidia.py): their `vocab_sha256` is "", unknown, their
    `offsets` are empty. With `skipped`, files that are not whole are left out and noted there (path -> why), unless all
    are.

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
    if not shards:
        raise InputError(
            f"every shard is bad: {'; '.join(skipped.values())}"
            if skipped
            else "no shards are named: data.files is empty"
        )
    if sum(shard.num_samples for shard in shards) == 0:
        raise InputError(f"{', '.join(shard.path for shard in shards)}: holds no samples")
    for shard in shards:
        first = shards[0]
        if kind(shard) != kind(first):
            raise InputError(
                "%s: sequence length %d, %d masked tokens, %d words, vocabulary %.12s; %s has %d, %d, %d, %.12s. "
                "Train on shards of one data set" % ((shard.path,) + kind(shard) + (first.path,) + kind(first))
            )
        if (shard.masking, shard.mask_share, shard.continuations) != (
            first.masking,
            first.mask_share,
            first.continuations,
        ):
            raise InputError(
                f"{shard.path}: its masking is {shard.masking} with a share of {shard.mask_share:g}, that of "
                f"{first.path} is {first.masking} with {first.mask_share:g}. Train on shards of one data set"
            )
        if sequence_length is not None and shard.sequence_length != sequence_length:
            raise InputError(
                f"{shard.path}: its samples have sequence length {shard.sequence_length}, "
                f"data.sequence_length is {sequence_length}. Prepare the text again with --sequence-length "
                f"{sequence_length}, or set data.sequence_length"
            )
        if mask_tokens is not None and shard.mask_tokens != mask_tokens:
            raise InputError(
                f"{shard.path}: its samples have room for {shard.mask_tokens} masked tokens, data.mask_tokens "
                f"is {mask_tokens}. Prepare the text again with --mask-tokens {mask_tokens}, or set "
                "data.mask_tokens"
            )
        if vocab_size is not None and shard.vocab_size > vocab_size:
            raise InputError(
                f"{shard.path}: was made with a vocabulary of {shard.vocab_size} words, model.vocab_size is "
                f"{vocab_size}. Set model.vocab_size to {shard.vocab_size}"
            )
    return shards


def kind(shard: ShardInfo) -> Tuple[int, int, int, str]:
    return shard.sequence_length, shard.mask_tokens, shard.vocab_size, shard.vocab_sha256


def read_checked(shard: ShardInfo, start: int, stop: int, before: int) -> Samples:
    if not shard.offsets:
        return read_nvidia(shard.path, start, stop, shard.vocab_size)
    samples = read_samples(shard.path, start, stop)
    check_samples(samples, shard.vocab_size, shard.path, start)
    if shard.masking == "dynamic":
        numbers = before + np.arange(start, stop)
        samples = mask_dynamic(samples, numbers, 0, 0, mask_words_of(shard), shard.mask_share)
    return samples
