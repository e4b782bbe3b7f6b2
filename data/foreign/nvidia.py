"""NVIDIA's HDF5 files of BERT samples: read block by block, and written.

Shape letters: N samples, L sequence length, M mask slots. The data sets are `data.foreign.bert_layout`'s features,
gzip-compressed; int32 [N, L] input_ids, int32 [N, M] masked_lm_positions and masked_lm_ids, int8 the others. As
create_pretraining_data.py of NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT, writes them. This project adds
the attribute `segments`, 1, to a file whose samples have one segment.
"""

import contextlib
import os
from typing import Iterable, Optional

import h5py

from data.errors import InputError
from data.foreign.bert_layout import BERT_FEATURES, check_shapes, from_samples, to_samples
from data.hdf5_file import new_hdf5
from data.samples import Samples
from data.shards import ShardInfo

__all__ = ["is_nvidia", "open_nvidia", "read_nvidia", "write_nvidia"]

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
    """A file for `read_nvidia`; it does not say of which size its vocabulary is, nor its hash: `vocab_sha256` is "".

    Raises InputError that names the file: missing, not HDF5 or cut off, a data set missing or of another shape or type
    than integers.
    """
    try:
        with h5py.File(path, "r") as file:
            check_datasets(file, path)
            count, sequence_length = file["input_ids"].shape
            mask_tokens, segments = file["masked_lm_positions"].shape[1], int(file.attrs.get("segments", 2))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}). It may be cut off: get it again")
    sizes = (count, sequence_length, mask_tokens, vocab_size)
    return ShardInfo(path, *sizes, "", os.path.getsize(path), is_nvidia=True, segments=segments)


def check_datasets(file: h5py.File, path: str) -> None:
    for name in BERT_FEATURES:
        if not isinstance(file.get(name), h5py.Dataset):
            expected = f"NVIDIA's files have {list(BERT_FEATURES)}"
            raise InputError(f"{path}: the data set {name!r} is missing; found {sorted(file)}, {expected}")
        if file[name].dtype.kind not in "iu":
            raise InputError(f"{path}: data set {name!r} is {file[name].dtype}, expected integers")
    check_shapes(file, path)


def read_nvidia(path: str, start: int, stop: int, vocab_size: int, file: Optional[h5py.File] = None) -> Samples:
    """The samples [start, stop) of a file that `open_nvidia` found whole, or of `file`, the same held open.

    Raises InputError that names the file, and the sample when it is not as it must be (`bert_layout.to_samples`).
    """
    try:
        with contextlib.nullcontext(file) if file else h5py.File(path, "r") as opened:
            arrays = {name: opened[name][start:stop] for name in BERT_FEATURES}
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot read samples {start} to {stop} ({error})")
    return to_samples(arrays, vocab_size, path, start)


def write_nvidia(path: str, parts: Iterable[Samples], segments: int = 2) -> None:
    """Writes a file as NVIDIA's script does, with samples of one sequence length and number of mask slots.

    Raises InputError for samples that the layout cannot hold (`bert_layout.from_samples`), OSError that names the file
    when the disk is full.
    """
    done = 0
    with new_hdf5(path) as file:
        if segments != 2:
            file.attrs["segments"] = segments
        for samples in parts:
            for name, values in from_samples(samples, path, done).items():
                shape = values.shape[1:]
                if name not in file:
                    sizes = dict(shape=(0, *shape), maxshape=(None, *shape), chunks=(CHUNK, *shape))
                    file.create_dataset(name, dtype=values.dtype, compression="gzip", **sizes)
                file[name].resize(done + len(samples), axis=0)
                file[name][done:] = values
            done += len(samples)
