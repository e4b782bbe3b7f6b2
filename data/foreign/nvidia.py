"""NVIDIA's HDF5 files of BERT samples: read block by block, and written.

Shape letters: N samples, L sequence length, M mask slots. The data sets are `data.foreign.bert_layout`'s features,
gzip-compressed; int32 [N, L] input_ids, int32 [N, M] masked_lm_positions and masked_lm_ids, int8 the others. As
create_pretraining_data.py of NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT, writes them.
"""

import contextlib
import os
from typing import Iterable, Optional

import h5py
import numpy as np

from data.errors import InputError
from data.foreign.bert_layout import BERT_FEATURES, from_samples, to_samples
from data.hdf5_file import new_hdf5
from data.samples import Samples
from data.shards import ShardInfo

__all__ = ["is_nvidia", "open_nvidia", "read_nvidia", "write_nvidia"]

TYPES = {
    name: np.dtype(np.int32 if name in ("input_ids", "masked_lm_positions", "masked_lm_ids") else np.int8)
    for name in BERT_FEATURES
}
CHUNK = 256  # samples that are compressed together: the loader's blocks


def is_nvidia(path: str) -> bool:
    """Whether this is a whole HDF5 file with one of NVIDIA's data sets and without this project's mark."""
    try:
        file = h5py.File(path, "r")
    except OSError:
        return False
    with file:
        return "format" not in file.attrs and any(name in file for name in ("input_mask", "masked_lm_ids"))


def open_nvidia(path: str, vocab_size: int) -> ShardInfo:
    """What `data.shards.open_shards` tells of a shard, with the vocabulary's size as given, for the file does not tell
    it.

    `vocab_sha256` is "", unknown; the file is read with `read_nvidia`. Raises InputError that
    names the file: missing, not HDF5 or cut off, a data set missing or of another shape or type than integers.
    """
    try:
        with h5py.File(path, "r") as file:
            check_datasets(file, path)
            count, sequence_length = file["input_ids"].shape
            mask_tokens = file["masked_lm_positions"].shape[1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}). It may be cut off: get it again")
    return ShardInfo(path, count, sequence_length, mask_tokens, vocab_size, "", os.path.getsize(path), is_nvidia=True)


def check_datasets(file: h5py.File, path: str) -> None:
    missing = [name for name in BERT_FEATURES if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise InputError(
            f"{path}: the data set {missing[0]!r} is missing; found {sorted(file)}, NVIDIA's files have "
            f"{list(BERT_FEATURES)}"
        )
    shapes = {name: file[name].shape for name in BERT_FEATURES}
    tokens, masks = shapes["input_ids"], shapes["masked_lm_positions"]
    for name, shape in shapes.items():
        expected = masks if name.startswith("masked_lm") else tokens[:1] if name == "next_sentence_labels" else tokens
        if shape != expected or len(shape) != (1 if name == "next_sentence_labels" else 2) or shape[:1] != tokens[:1]:
            raise InputError(
                f"{path}: data set {name!r} has the shape {shape}, expected [N, L] for tokens, [N, M] for "
                f"masked_lm_*, [N] for next_sentence_labels; input_ids has {tokens}"
            )
        if file[name].dtype.kind not in "iu":
            raise InputError(f"{path}: data set {name!r} is {file[name].dtype}, expected integers")


def read_nvidia(path: str, start: int, stop: int, vocab_size: int, file: Optional[h5py.File] = None) -> Samples:
    """The samples [start, stop) of a file that `open_nvidia` found whole, checked, in the project's layout.

    `file`: the same, held open by the caller.

    Raises InputError that names the file, and the sample when it is not as it must be (see
    `data.foreign.bert_layout.to_samples`).
    """
    try:
        with contextlib.nullcontext(file) if file else h5py.File(path, "r") as opened:
            arrays = {name: opened[name][start:stop] for name in BERT_FEATURES}
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot read samples {start} to {stop} ({error})")
    return to_samples(arrays, vocab_size, path, start)


def write_nvidia(path: str, parts: Iterable[Samples]) -> None:
    """Writes a file as NVIDIA's script does, with samples of one sequence length and number of mask slots.

    Raises InputError for samples that the layout cannot hold (see `data.foreign.bert_layout.from_samples`), OSError
    that names the file when the disk is full.
    """
    done = 0
    with new_hdf5(path) as file:
        for samples in parts:
            for name, values in from_samples(samples, path, done).items():
                if name not in file:
                    file.create_dataset(
                        name,
                        (0,) + values.shape[1:],
                        TYPES[name],
                        maxshape=(None,) + values.shape[1:],
                        chunks=(CHUNK,) + values.shape[1:],
                        compression="gzip",
                    )
                file[name].resize(done + len(samples), axis=0)
                file[name][done:] = values
            done += len(samples)
