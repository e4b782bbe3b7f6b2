"""What differs between the devices that TorchEngine trains on. Another one is another class here."""

import ctypes
import os
import shutil
from typing import Any, ContextManager, Optional, Protocol, Tuple

import torch
from torch import nn

from data.errors import InputError
from ops.native import multiplies_bfloat16

__all__ = ["Cpu", "Cuda", "Memory", "Mps", "TorchDevice", "choose_precision", "wants_compile"]


class Memory(Protocol):
    """A device's own memory, which limits the size of a micro-batch."""

    def card(self) -> str:
        """The name of what has it, for people."""

    def available_bytes(self) -> int:
        """What training may still take."""

    def reset_peak(self) -> None:
        """Gives unused memory back, and begins to look for the peak anew."""

    def peak_bytes(self) -> int:
        """The most that was in use since then."""


class TorchDevice(Protocol):
    """A device, in PyTorch's name for it."""

    name: str
    asynchronous: bool
    """Whether calls return before it is done."""
    hidden_bytes: int
    """Size of a micro-batch's hidden state [R, L, H] where the config leaves its rows open."""
    compiler_name: str
    auto_compile: bool
    """Whether compiled layers are faster."""
    compiles_kernels: bool
    """Whether compiled layers call the kernels of ops/."""
    memory: Optional[Memory]
    """None where micro-batches are limited by speed, not by memory."""

    def start(self, keeps_memory: bool) -> None:
        """Prepares the process, which may keep memory that it does not use where that makes it faster."""

    def synchronize(self) -> None:
        """Waits until the device is done."""

    def fork_random(self) -> ContextManager:
        """Random numbers that are drawn inside leave those after it as they would be."""

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host there."""

    def to_host(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        """A copy on the host and, of an asynchronous device, an event: its `synchronize()` waits until the copy is
        there."""

    def has_bfloat16(self) -> bool:
        """Whether its matrix products are faster in bfloat16."""

    def why_no_float8(self) -> str:
        """Why float8 cannot be used there; empty where it can."""

    def find_compiler(self) -> Optional[str]:
        """What torch.compile generates code with; None where it is missing."""


class Cpu:
    name, asynchronous = "cpu", False
    memory: Optional[Memory] = None
    hidden_bytes = 4 * 2**20  # stay near the caches
    # A compiled layer is no faster than the library calls it replaces, and takes 15 s to compile.
    compiler_name, auto_compile, compiles_kernels = "C++ compiler (g++, or CXX)", False, False

    def start(self, keeps_memory: bool) -> None:
        """Has the C library (glibc; others are left alone) keep the memory of freed tensors, if it may.

        Else each micro-batch's activations are mapped anew, page by page: a tenth of a step of BERT-base.
        """
        if not keeps_memory:
            return
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except AttributeError:
            return
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)

    def synchronize(self) -> None:
        pass

    def fork_random(self) -> ContextManager:
        return torch.random.fork_rng(devices=[])

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def to_host(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        return tensor, None

    def has_bfloat16(self) -> bool:
        return multiplies_bfloat16()

    def why_no_float8(self) -> str:
        return ""

    def find_compiler(self) -> Optional[str]:
        return shutil.which(os.environ.get("CXX", "g++"))


class CudaMemory:
    def card(self) -> str:
        return torch.cuda.get_device_name()

    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return int(0.9 * (free + torch.cuda.memory_reserved()))

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()


class Cuda:
    name, asynchronous = "cuda", True
    memory: Optional[Memory] = CudaMemory()
    hidden_bytes = 192 * 2**20  # more make nothing faster
    compiler_name, auto_compile, compiles_kernels = "Triton", True, True

    def start(self, keeps_memory: bool) -> None:
        """Has the allocator grow its segments, unless the environment configures it: the number of masked tokens
        varies, and memory in pieces of a few sizes would be full before it is used up. And has no product add up
        parts that are rounded to bfloat16: a weight's gradient is a sum over all tokens of a micro-batch."""
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            # The variable would be read too late: asking for the card's name has started the allocator.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def fork_random(self) -> ContextManager:
        return torch.random.fork_rng(devices=["cuda"])

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pinned memory the host need not wait until the device takes the copy, behind the micro-batch before.
        return tensor.pin_memory().to("cuda", non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        # The copy takes its place in the device's queue behind this step, and before the next: reading it need not wait
        # for that.
        host = torch.empty(tensor.shape, pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def has_bfloat16(self) -> bool:
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def why_no_float8(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= (8, 9):
            return "" if self.find_compiler() else "there is no Triton, which its kernel needs"
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}, and only 8.9 and newer (Ada, Hopper) multiply it"

    def find_compiler(self) -> Optional[str]:
        try:
            import triton
        except ImportError:
            return None
        return triton.__name__


class Mps:
    """Apple's GPUs, in float32; bert/engines/mps.py tries them first."""

    name, asynchronous = "mps", True
    memory: Optional[Memory] = None  # it is the host's
    hidden_bytes = 16 * 2**20
    compiler_name, auto_compile, compiles_kernels = "compiler for mps", False, False

    def start(self, keeps_memory: bool) -> None:
        pass

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def fork_random(self) -> ContextManager:
        return torch.random.fork_rng(devices=[0], device_type=self.name)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.name)

    def to_host(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        return tensor.cpu(), self  # which waits for it

    def has_bfloat16(self) -> bool:
        return False

    def why_no_float8(self) -> str:
        return "Apple's GPUs do not multiply it"

    def find_compiler(self) -> Optional[str]:
        return None


def choose_precision(device: TorchDevice, setting: str) -> str:
    """training.precision with `auto` decided. Raises InputError where the device or this torch cannot do it."""
    if setting == "auto":
        return "bfloat16" if device.has_bfloat16() else "float32"
    if setting == "float8" and not hasattr(torch, "float8_e4m3fn"):
        raise InputError(
            f'training.precision is "float8", but torch {torch.__version__} has no float8. Install requirements.txt, '
            'or set training.precision to "auto"'
        )
    why_not = device.why_no_float8() if setting == "float8" else ""
    if why_not:
        raise InputError(f'training.precision is "float8", but {why_not}. Set training.precision to "auto"')
    return setting


def wants_compile(device: TorchDevice, setting: str) -> Tuple[bool, str]:
    """Whether layers are compiled, by training.compile, and words that say so. Raises InputError where they cannot
    be."""
    if setting == "on" and not hasattr(nn.Module, "compile"):
        raise InputError(
            f'training.compile is "on", but torch {torch.__version__} has no Module.compile. Install requirements.txt, '
            'or set training.compile to "auto"'
        )
    compiler, missing = device.find_compiler(), f"no {device.compiler_name}"
    if setting == "on" and compiler is None:
        raise InputError(
            f'training.compile is "on", but there is {missing}. Install it, or set training.compile to "auto"'
        )
    wanted = device.auto_compile and setting == "auto"
    if setting == "on" or (wanted and compiler):
        return True, "encoder layers compiled"
    return False, f"not compiled ({missing})" if wanted else "not compiled"
