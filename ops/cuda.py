"""Where the Triton kernels of this folder run."""

import importlib.util

import torch

__all__ = ["takes_triton"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def takes_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels take this tensor."""
    return HAS_TRITON and tensor.is_cuda
