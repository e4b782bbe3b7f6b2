"""The C++ kernels beside this file, built at first use; plain C functions, called through ctypes.

They take pointers and sizes, not tensors, and include nothing of torch: they build in seconds and work with any torch.
There is one library for each type of activations. torch's own extension loader is not used: it needs ninja, and a
process killed while it builds leaves a lock for which all others wait for ever.

The operations that use them add the gradients of parameters in place, as part of the matrix product: to
`parameter.grad`, in float32. A bfloat16 parameter has a float32 `master`, an attribute, whose `.grad` that is.

Which product serves where is a rule, not a measurement, so that a run that is resumed computes the same bits
(benchmarks/ops.py shows the rates): oneDNN's for outputs and the gradients of inputs, with weights that are packed once
for all micro-batches of a step; this project's for the gradients of weights, which adds to them and packs on the way,
but oneDNN's and an addition where it multiplies bfloat16 in tiles (AMX).

Shape letters: T tokens, I input features, O output features.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from typing import Dict, Optional, Tuple

import torch

from ops.ipu import is_lowering

__all__ = [
    "accumulate_bias_grad",
    "accumulate_weight_grad",
    "add_weight_grad",
    "call",
    "draw_seed",
    "grad_of",
    "is_native",
    "linear",
    "linear_input_grad",
    "multiplies_bfloat16",
    "multiplies_in_tiles",
    "native",
    "packed_weights",
    "pointer",
]

_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)

HERE = os.path.dirname(os.path.abspath(__file__))
ENCODER = ("attention.cpp", "encoder.cpp", "product.cpp")
LIBRARIES = {torch.float32: (*ENCODER, "lamb.cpp"), torch.bfloat16: ("-DREAL=bfloat16", *ENCODER)}
PACKING_USES = 4  # from how many products on of one weight it pays to pack it
# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning (-ffast-math takes it away, for
# the whole process). Pairs of bfloat16 are read as one number: no strict aliasing.
FLAGS = (
    "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
    "-fno-strict-aliasing -fopenmp -shared -fPIC"
)


def native(dtype: torch.dtype = torch.float32) -> Optional[ctypes.CDLL]:
    """The library of the kernels for activations of a type, LAMB among them in float32's; None, with one warning that
    says why, where it cannot be built.

    Built once for each version of the sources, in the folder TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions.
    """
    return _library(dtype)


@functools.lru_cache(maxsize=None)
def _library(dtype: torch.dtype) -> Optional[ctypes.CDLL]:
    command = shlex.split(os.environ.get("CXX", "g++")) + FLAGS.split() + list(LIBRARIES[dtype])
    # The code is for this very processor: machines that share a home directory do not share it.
    key = hashlib.sha256("\n".join([*command, _processor()]).encode())
    for source in ("kernels.h", *(name for name in LIBRARIES[dtype] if name.endswith(".cpp"))):
        with open(os.path.join(HERE, source), "rb") as file:
            key.update(file.read())
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    library = os.path.join(folder, f"bert_kernels_{key.hexdigest()[:16]}.so")
    try:
        if not os.path.exists(library):
            os.makedirs(folder, exist_ok=True)
            # Built elsewhere and moved: the file is whole or absent, even if others build it too or this is killed.
            with tempfile.TemporaryDirectory(dir=folder) as place:
                built = os.path.join(place, "kernels.so")
                subprocess.run([*command, "-o", built], cwd=HERE, check=True, text=True, capture_output=True)
                os.replace(built, library)
        return ctypes.CDLL(library)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        need = "They need g++, or another C++ compiler with OpenMP, named by CXX (macOS: brew install gcc, CXX=g++-15)"
        instead = "PyTorch's own, slower operations take their place"
        warnings.warn(f"the C++ kernels cannot be built, and {instead}: {reason}. {need}", stacklevel=2)
        return None


@functools.lru_cache(maxsize=None)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform()


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 natively here: the processor has AVX512-BF16, as all that have AMX do, and
    ONEDNN_MAX_CPU_ISA does not keep it from that."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    limited = not limit.startswith(
        ("ALL", "DEFAULT", "AVX10", *(f"AVX512_CORE_{name}" for name in ("BF", "FP", "AMX")))
    )
    return "avx512_bf16" in _processor().split() and not limited and _has_onednn(torch.bfloat16)


@functools.lru_cache(maxsize=None)
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type at all; torch 2.0's product is always fused with an activation."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch, "compiler"):
        return False
    try:
        _onednn(torch.ones(16, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype), None)
    except RuntimeError:  # "could not create a primitive": bfloat16 with AVX2
        return False
    return True


def multiplies_in_tiles() -> bool:
    """Whether the processor has AMX, whose products of bfloat16 are several times those of AVX512-BF16."""
    return "amx_bf16" in _processor().split()


def is_native(*tensors: torch.Tensor, parameters=()) -> bool:
    """Whether the kernels take these tensors: all float32 or all bfloat16, on the CPU, not while anything traces the
    model.

    `parameters` get their gradients in place, so they must be leaves, and those of bfloat16 have a float32 `master`:
    what is computed from others takes PyTorch's operations.
    """
    everything = (*tensors, *parameters)
    dtype = everything[0].dtype
    return (
        not is_lowering()
        and not _is_compiling()
        and dtype in LIBRARIES
        and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in everything)
        and all(parameter.is_leaf and _has_float32(parameter) for parameter in parameters)
        and native(dtype) is not None
    )


def _has_float32(parameter) -> bool:
    return parameter.dtype == torch.float32 or hasattr(parameter, "master") or not parameter.requires_grad


def call(name: str, first: torch.Tensor, *others) -> None:
    """Calls a kernel of the library for `first`'s type: tensors as pointers, int as long, float as double. Other
    floating-point tensors are of that type or float32."""
    for argument in (first, *others):
        is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
        if is_float and argument.dtype not in {first.dtype, torch.float32} & LIBRARIES.keys():
            raise ValueError(f"{name} of {first.dtype} takes that and float32, not {argument.dtype}")
    convert = {int: ctypes.c_long, float: ctypes.c_double}
    function = getattr(native(first.dtype), name)
    function(pointer(first), *(convert.get(type(argument), pointer)(argument) for argument in others))


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


_packed: Optional[Dict[Tuple[torch.Tensor, bool], torch.Tensor]] = None


@contextlib.contextmanager
def packed_weights(uses: int):
    """While open, weights do not change, and each is used `uses` times or so: packed once, oneDNN's products of it are
    up to a quarter faster."""
    global _packed
    before, _packed = _packed, {} if uses >= PACKING_USES else None
    try:
        yield
    finally:
        _packed = before


def _product(x, weight, bias, transposed: bool):
    """x times the weight [O, I] transposed, or times the weight itself where it is to be `transposed`, and the bias."""
    matrix = weight.t() if transposed else weight
    if not x.numel() or not _has_onednn(x.dtype):
        return torch.nn.functional.linear(x, matrix, bias)
    if _packed is not None:
        key = weight, transposed
        if key not in _packed:
            with torch.no_grad():
                _packed[key] = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), len(x))
        matrix = _packed[key]
    return _onednn(x, matrix, bias)


def _onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x [T, I], weight [O, I], bias [O] -> [T, O], without autograd."""
    return _product(x, weight, bias, transposed=False)


def linear_input_grad(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a linear layer's input: gradient [T, O], weight [O, I] -> [T, I]."""
    return _product(gradient, weight, None, transposed=True)


def accumulate_weight_grad(weight: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> None:
    """Adds to the gradient of `weight` [O, I], from gradient [T, O] and x [T, I] of a linear layer, unless `weight` is
    frozen."""
    if weight.requires_grad:
        add_weight_grad(grad_of(weight), gradient, x)


def add_weight_grad(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> None:
    """Adds gradient [T, O] transposed times x [T, I] to `total` [O, I] float32."""
    if x.dtype == torch.bfloat16 and multiplies_in_tiles():
        total.add_(gradient.t() @ x)
    else:
        call("weight_gradient", gradient.contiguous(), x.contiguous(), total, len(x), *total.shape)


def accumulate_bias_grad(bias: torch.Tensor, gradient: torch.Tensor) -> None:
    """Adds to the gradient of `bias` [O] the sum over the tokens of gradient [T, O], unless `bias` is frozen."""
    if bias.requires_grad:
        call("add_token_sums", gradient.contiguous(), grad_of(bias), *gradient.shape)


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    """The float32 gradient of a parameter, to be added to: zeros if there was none. For a frozen parameter, zeros that
    nothing reads."""
    master = getattr(parameter, "master", parameter)
    if not parameter.requires_grad:
        return torch.zeros_like(parameter, dtype=torch.float32)
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad
