"""The C++ kernels beside this file, built at first use; plain C functions, called through ctypes.

They take pointers and sizes, not tensors, and include nothing of torch: they build in seconds and work with any torch.
The operations that use them add the gradients of parameters to `parameter.grad` in place, as part of the matrix
product. torch's own extension loader is not used: it needs ninja, and a process killed while it builds leaves a lock
for which all others wait for ever.

Shape letters: T tokens, I input features, O output features.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from typing import Optional

import torch

from ops.ipu import is_lowering

__all__ = [
    "accumulate_weight_grad",
    "call",
    "draw_seed",
    "grad_of",
    "is_native",
    "linear",
    "linear_input_grad",
    "native",
    "pointer",
]

_IS_TORCH_2_0 = not hasattr(torch, "compiler")  # its oneDNN product is always fused with an activation
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)

SOURCES = ("encoder.cpp", "lamb.cpp")
# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning (-ffast-math takes it away, for
# the whole process).
FLAGS = (
    "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
    "-fopenmp -shared -fPIC"
)


@functools.lru_cache(maxsize=None)
def native() -> Optional[ctypes.CDLL]:
    """The library of the kernels; None, with one warning that says why, where it cannot be built.

    Built once for each version of the sources, in the folder TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    sources = [os.path.join(here, source) for source in SOURCES]
    command = shlex.split(os.environ.get("CXX", "g++")) + FLAGS.split() + sources
    # The code is for this very processor: machines that share a home directory do not share it.
    key = hashlib.sha256("\n".join([*command, _processor()]).encode())
    for source in sources:
        with open(source, "rb") as file:
            key.update(file.read())
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    library = os.path.join(folder, f"bert_kernels_{key.hexdigest()[:16]}.so")
    try:
        if not os.path.exists(library):
            os.makedirs(folder, exist_ok=True)
            # Built elsewhere and moved: the file is whole or absent, even if others build it too or this is killed.
            with tempfile.TemporaryDirectory(dir=folder) as place:
                built = os.path.join(place, "kernels.so")
                subprocess.run([*command, "-o", built], check=True, text=True, capture_output=True)
                os.replace(built, library)
        return ctypes.CDLL(library)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        need = "They need g++, or another C++ compiler with OpenMP, named by CXX"
        instead = "PyTorch's own, slower operations take their place"
        warnings.warn(f"the C++ kernels cannot be built, and {instead}: {reason}. {need}", stacklevel=2)
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform()


def is_native(*tensors: torch.Tensor, parameters=()) -> bool:
    """Whether the kernels take these tensors: float32 on the CPU, not while anything traces the model.

    `parameters` get their gradients in place, so they must be leaves: what is computed from others takes PyTorch's
    operations.
    """
    return (
        not is_lowering()
        and not _is_compiling()
        and all(parameter.is_leaf for parameter in parameters)
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (*tensors, *parameters))
        and native() is not None
    )


def call(name: str, *arguments) -> None:
    """Calls a kernel: tensors as pointers, int as long, float as double. Floating-point tensors must be float32."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.dtype != torch.float32:
            raise ValueError(f"{name} takes float32, not {argument.dtype}")
    convert = {int: ctypes.c_long, float: ctypes.c_double}
    getattr(native(), name)(*(convert.get(type(argument), pointer)(argument) for argument in arguments))


def pointer(tensor: Optional[torch.Tensor]) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor's data; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p()
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        there = f"one on {tensor.device} with strides {tensor.stride()}"
        raise ValueError(f"a kernel needs a contiguous tensor on the CPU, not {there}")
    return ctypes.c_void_p(tensor.data_ptr())


def draw_seed() -> int:
    """A seed for a kernel's dropout, from torch's generator."""
    return int(torch.randint(2**62, ()))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x [T, I], weight [O, I], bias [O] -> [T, O], without autograd: oneDNN's product, the fastest with AVX-512."""
    if torch.backends.mkldnn.is_available() and x.numel() > 0 and not _IS_TORCH_2_0:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def linear_input_grad(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a linear layer's input: gradient [T, O], weight [O, I] -> [T, I]."""
    return linear(gradient, weight.t())


def accumulate_weight_grad(weight: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> None:
    """Adds to `weight.grad` [O, I], from gradient [T, O] and x [T, I] of a linear layer, unless `weight` is frozen."""
    if weight.requires_grad:
        if weight.grad is None:
            weight.grad = torch.mm(gradient.t(), x)
        else:
            weight.grad.addmm_(gradient.t(), x)


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter.grad`, to be added to: zeros if there was none. For a frozen parameter, zeros that nothing reads."""
    if not parameter.requires_grad:
        return torch.zeros_like(parameter)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
