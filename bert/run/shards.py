"""Reading tensors from safetensors: from a whole file, or from shards, each of which has a part of many tensors.

Shards are written and read by torch.distributed.checkpoint, in its form for Hugging Face: the header of a file says
where in its tensor each part belongs. No pickle is in them.
"""

import contextlib
import os
import warnings
from typing import Any, Dict, Mapping, Optional

import torch
from safetensors import SafetensorError, safe_open

from data.errors import InputError

__all__ = ["Shards", "Tensors", "WholeFile", "count_values", "opened"]

Tensors = Mapping[str, torch.Tensor]


@contextlib.contextmanager
def opened(path: str):
    """A safetensors file. Raises InputError that names it where it cannot be read, or is cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}")


class WholeFile:
    """The tensors of one file: their `shapes` by name, and their values as they are asked for."""

    def __init__(self, path: str):
        self.path = path
        with opened(path) as file:
            self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, likes: Tensors, dtype: Optional[torch.dtype] = None) -> Dict[str, torch.Tensor]:
        """New tensors of the names of `likes`, on the CPU, of `dtype` or else of the file's."""
        with opened(self.path) as file:
            tensors = {name: file.get_tensor(name) for name in likes}
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}


class Shards:
    """The same of all files in a folder: of shards, or of whole files. A DTensor gets only what it holds a part of."""

    def __init__(self, path: str):
        try:
            from torch.distributed.checkpoint import HuggingFaceStorageReader
        except ImportError:
            raise InputError(
                f"{path}: torch {torch.__version__} cannot read shards. Where requirements.txt is installed, make a "
                f"whole model of them: python -m bert.export {os.path.dirname(path)} FOLDER --license NAME"
            )
        for name in sorted(os.listdir(path)):
            if name.endswith(".safetensors"):
                with opened(os.path.join(path, name)):
                    pass
        self.path, self.reader = path, HuggingFaceStorageReader(path)
        metadata: Any = self.reader.read_metadata()
        self.reader.read_metadata = lambda: metadata  # type: ignore[method-assign]  # which would open all files again
        self.tensors = metadata.state_dict_metadata
        self.shapes: Dict[str, torch.Size] = {name: tensor.size for name, tensor in self.tensors.items()}

    def read(self, likes: Tensors, dtype: Optional[torch.dtype] = None) -> Dict[str, torch.Tensor]:
        """New tensors of the names, shapes, devices and placements of `likes`."""
        from torch.distributed.checkpoint import load

        values = {
            name: torch.empty_like(like, dtype=dtype or self.tensors[name].properties.dtype)
            for name, like in likes.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
            load(values, storage_reader=self.reader, no_dist=True)
        return values


def count_values(tensors: Mapping) -> Dict[str, int]:
    """How many values of each tensor are there, by what torch.distributed.checkpoint says of them."""
    return {name: sum(chunk.sizes.numel() for chunk in tensor.chunks) for name, tensor in tensors.items()}
