"""Tensors of which each process holds a part: DTensors, as FSDP2 makes them of parameters (`Shard(0)`: each process has
some of the rows, of the last ones perhaps fewer, or none).

Nothing here communicates. A plain tensor is its own part. Imported with torch 2.0, which has no DTensors.
"""

from typing import Tuple

import torch

__all__ = ["as_part", "is_dtensor", "local_part", "part_of", "place_of", "shard_like"]


def is_dtensor(tensor) -> bool:
    return hasattr(tensor, "to_local")  # the type's import takes a second, which a process alone need not wait


def local_part(tensor):
    """This process's part of a tensor, which shares its memory; None for None."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def place_of(tensor: torch.Tensor) -> Tuple[int, int]:
    """How many rows of the whole tensor lie before this process's part, and how many it has."""
    return (_shape_and_offsets(tensor)[1][0] if is_dtensor(tensor) else 0), len(tensor)


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of what this process has of `whole`, where it is sharded as `like`, of the same shape."""
    if is_dtensor(like):
        for dimension, (size, offset) in enumerate(zip(*_shape_and_offsets(like))):
            whole = whole.narrow(dimension, offset if size else 0, size)
    return whole


def as_part(local: torch.Tensor, like) -> torch.Tensor:
    """`local`, with the same memory, as this process's part of a tensor that is sharded as `like`."""
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    place = like.device_mesh, like.placements
    return DTensor.from_local(local, *place, run_check=False, shape=like.shape, stride=like.stride())


def shard_like(tensor, like) -> torch.Tensor:
    """A copy of `tensor`, which is whole or a DTensor, sharded as `like`, and of its type and device.

    Raises ValueError for a DTensor that is sharded in another way: torch.distributed.checkpoint changes that.
    """
    if is_dtensor(tensor) and tensor.placements != like.placements:
        raise ValueError(f"a tensor of placements {tensor.placements}, expected {like.placements}")
    local = local_part(tensor) if is_dtensor(tensor) else part_of(tensor, like)
    return as_part(local.to(like.device, like.dtype, copy=True), like)


def _shape_and_offsets(tensor) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
