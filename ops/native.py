"""The C++ kernels beside this file, built at first use with torch's extension loader; plain C functions, called through ctypes.

They take pointers and sizes, not tensors, and include nothing of torch: they build in seconds and work with any torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import warnings
from typing import Optional

import torch

__all__ = ["native", "pointer"]

SOURCES = ("lamb.cpp",)
# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning (-ffast-math takes it away, for the whole process).
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")


@functools.lru_cache(maxsize=None)
def native() -> Optional[ctypes.CDLL]:
    """The library of the kernels; None, with one warning that says why, where it cannot be built."""
    from torch.utils import cpp_extension

    folder = os.path.dirname(os.path.abspath(__file__))
    # The code is for this very processor: machines that share a home directory do not share it.
    name = "bert_kernels_" + hashlib.sha256(_processor().encode()).hexdigest()[:12]
    try:
        build = cpp_extension._get_build_directory(name, verbose=False)
        cpp_extension.load(name, [os.path.join(folder, source) for source in SOURCES], build_directory=build, is_python_module=False,
                           extra_cflags=["-O3", "-march=native", *MATH, "-fopenmp"], extra_ldflags=["-fopenmp"])
    except (OSError, RuntimeError) as error:
        warnings.warn("the C++ kernels cannot be built, and PyTorch's own, slower operations take their place: %s. They need g++ (or "
                      "another C++ compiler, named by CXX) and ninja" % str(error).strip().splitlines()[0])
        return None
    return ctypes.CDLL(os.path.join(build, name + ".so"))


def pointer(tensor: Optional[torch.Tensor]) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor's data; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p()
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("a kernel needs a contiguous tensor on the CPU, not one on %s with strides %s" % (tensor.device, tensor.stride()))
    return ctypes.c_void_p(tensor.data_ptr())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.platform()
