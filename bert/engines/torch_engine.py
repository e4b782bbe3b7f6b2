"""The engine for CUDA and CPU: a step is a loop over micro-batches."""

import ctypes
import os
import shutil
from typing import Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from bert.signals import cancellable, protected
from data.errors import InputError
from data.rows import unpad
from ops.attention import has_varlen_kernel
from ops.lamb import Lamb, lamb_groups

__all__ = ["TorchEngine"]


class TorchEngine:
    """Trains `graph` (batch of rows, or of tokens laid end to end, -> weighted loss, metrics) with LAMB on one device.

    The graph's parameters are in the type that it computes in; `masters`, the weights that LAMB updates, are float32:
    in float32 the same tensors, in bfloat16 rounded copies are made of them once a step. `layers` are compiled one by
    one, where `compile` says so; `head_size` is their attention's. Dropout draws from a generator state of its own: a
    function of (seed, step, first row of the micro-batch), so that a run is repeatable whatever else draws random
    numbers. `steps_done` is the last step whose update is in the weights. On CUDA a step is `asynchronous`: it returns
    before the device is done.
    """

    steps_per_call, index, processes = 1, 0, 1

    def __init__(
        self,
        graph: nn.Module,
        device: str,
        head_size: int,
        weight_decay: float,
        betas,
        eps: float,
        seed: int,
        micro_batch_size: int,
        precision: str = "auto",
        compile: str = "auto",
        layers: Sequence[nn.Module] = (),
    ):
        if device == "cpu":
            keep_memory()
        self.device, self.seed, self.micro_batch_size = torch.device(device), seed, micro_batch_size
        self.graph, self.asynchronous = graph.to(self.device), device == "cuda"
        self.precision = choose_precision(device, precision)
        self.masters, copies = dict(graph.named_parameters()), {}
        if self.precision != "float32":
            self.masters = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in self.masters.items()}
            graph.to(torch.bfloat16)
            copies = {self.masters[name]: parameter.detach() for name, parameter in graph.named_parameters()}
        self.optimizer = Lamb(lamb_groups(self.masters.items(), weight_decay), lr=0.0, betas=betas, eps=eps)
        self.optimizer.compute_weights = copies
        self.steps_done, self.finished = 0, {}
        self.compiled, self.compile_line = wants_compile(compile, device)
        # Traced code knows no kernels of ours on the CPU.
        self.unpad = has_varlen_kernel(device, next(graph.parameters()).dtype, head_size) and not (
            self.compiled and device == "cpu"
        )
        # One shape for all micro-batches, or each would be compiled anew, and a float8 product takes tokens by 16.
        self.static = self.compiled or self.precision == "float8"
        if self.compiled:
            for layer in layers:
                layer.compile(dynamic=False)

    def describe(self) -> str:
        """One line for people: precision, micro-batches, compilation."""
        return f"{self.precision}, micro-batches of {self.micro_batch_size} rows, {self.compile_line}"

    def step(
        self,
        batch: Dict[str, np.ndarray],
        learning_rate: float,
        step: int,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Dict[str, torch.Tensor]:
        """One optimizer step on a global batch of rows; calls `progress(rows)` after each micro-batch.

        Returns mlm_loss, nsp_loss, mlm_accuracy, nsp_accuracy, means over the global batch, and skipped_updates, the
        number of updates left out so far because a gradient was not finite: scalars, to be read after `wait_for(step)`.
        When it is interrupted before the update, weights and optimizer state are as before the call.
        """
        self.graph.train()
        self.clear_gradients()
        totals = {}
        with cancellable(), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for first, part in self.micro_batches(batch):
                key = np.random.SeedSequence([self.seed, step, first]).generate_state(1, np.uint64)[0]
                torch.manual_seed(int(key >> np.uint64(1)))
                self.backward(self.forward(part, totals))
                progress(min(self.micro_batch_size, len(batch["input_ids"]) - first))
        with protected():
            self.update(learning_rate)
            self.steps_done = step
            totals["skipped_updates"] = self.optimizer.skipped.clone()
            return self.to_host(totals, step)

    @torch.no_grad()
    def evaluate(self, batch: Dict[str, np.ndarray]) -> Dict[str, torch.Tensor]:
        """The metrics of `step` on these rows, without dropout and without an update."""
        self.graph.eval()
        totals = {}
        for _, part in self.micro_batches(batch):
            self.forward(part, totals)
        return totals

    def forward(self, part: Dict[str, torch.Tensor], totals: Dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one micro-batch; adds its metrics to `totals`."""
        loss, metrics = self.graph(part)
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of one micro-batch to those of the masters."""
        loss.backward()
        if self.precision == "float32":
            return
        for name, parameter in self.graph.named_parameters():
            if parameter.grad is not None:
                master = self.masters[name]
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def clear_gradients(self) -> None:
        for parameter in (*self.graph.parameters(), *self.masters.values()):
            parameter.grad = None

    def cut_evenly(self, rows: int) -> None:
        """Makes micro-batches smaller such that global batches of about `rows` rows need as many, with few rows to fill
        up."""
        count = -(-rows // self.micro_batch_size)
        # Later batches may pack into some more rows.
        self.micro_batch_size = min(self.micro_batch_size, -(-(rows + rows // 100) // (8 * count)) * 8)

    def update(self, learning_rate: float) -> None:
        """LAMB, with the gradients of the step's micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def micro_batches(self, batch):
        for first in range(0, len(batch["input_ids"]), self.micro_batch_size):
            part = {name: array[first : first + self.micro_batch_size] for name, array in batch.items()}
            if not part["sample_ids"].any():
                continue
            missing = self.micro_batch_size - len(part["input_ids"])
            if missing and self.static:  # fill up with empty rows
                part = {
                    name: np.concatenate([array, np.zeros((missing, array.shape[1]), array.dtype)])
                    for name, array in part.items()
                }
            # Found on the host, where it costs no wait for the device.
            if self.unpad:
                part = unpad(part, self.static)
            else:
                part["mlm_used"] = np.flatnonzero(part["mlm_weights"])
            yield first, {name: self.to_device(array) for name, array in part.items()}

    def to_device(self, array):
        if isinstance(array, int):
            return array
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        # From pinned memory the host need not wait until the device takes the copy, behind the micro-batch before.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, metrics: Dict[str, torch.Tensor], step: int) -> Dict[str, torch.Tensor]:
        # On CUDA the copy takes its place in the queue behind this step, and before the next: reading it need not wait
        # for that.
        if not self.asynchronous:
            return metrics
        values = torch.stack([value.float() for value in metrics.values()])
        host = torch.empty(len(metrics), pin_memory=True).copy_(values, non_blocking=True)
        self.finished[step] = torch.cuda.Event()
        self.finished[step].record()
        return dict(zip(metrics, host.unbind()))

    def wait_for(self, step: int) -> None:
        """Waits until the device is done with `step`, whose metrics can be read then."""
        if step in self.finished:
            self.finished[step].synchronize()
        self.finished = {later: event for later, event in self.finished.items() if later > step}

    def weights(self) -> Dict[str, torch.Tensor]:
        """Parameter name -> tensor, on the CPU, float32."""
        return {name: master.detach().cpu() for name, master in self.masters.items()}

    def load_weights(self, tensors: Dict[str, torch.Tensor]) -> None:
        """Takes what `weights` gives; the names must be the graph's."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.masters[name].copy_(tensor)
            for name, parameter in self.graph.named_parameters():
                parameter.copy_(self.masters[name])

    def optimizer_state(self) -> Dict[str, torch.Tensor]:
        """ "<parameter name>.exp_avg" and ".exp_avg_sq" -> tensor, on the CPU; empty before the first step."""
        return {
            f"{name}.{key}": tensor.cpu()
            for name, parameter in self.named_in_groups()
            for key, tensor in self.optimizer.state[parameter].items()
        }

    def skipped_updates(self) -> int:
        """How many updates were left out because a gradient was not finite."""
        return int(self.optimizer.skipped)

    def load_optimizer_state(self, tensors: Dict[str, torch.Tensor], skipped_updates: int = 0) -> None:
        """Takes what `optimizer_state` and `skipped_updates` give."""
        self.optimizer.skipped.fill_(skipped_updates)
        for name, parameter in self.named_in_groups():
            self.optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device, copy=True) for key in ("exp_avg", "exp_avg_sq")
            }

    def named_in_groups(self):
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"])


def keep_memory() -> None:
    """Has the C library (glibc; others are left alone) keep the memory of freed tensors.

    Else each micro-batch's activations are mapped anew, page by page: a tenth of a step of BERT-base.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def choose_precision(device: str, setting: str) -> str:
    if setting == "auto":
        return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if setting == "float8" and not hasattr(torch, "float8_e4m3fn"):
        raise InputError(
            f'training.precision is "float8", but torch {torch.__version__} has no float8. Install '
            'requirements.txt, or set training.precision to "auto"'
        )
    if setting == "float8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        found = (torch.cuda.get_device_name(),) + torch.cuda.get_device_capability()
        raise InputError(
            'training.precision is "float8", but %s has compute capability %d.%d, and only 8.9 and newer (Ada, Hopper) '
            'multiply it. Set training.precision to "auto"' % found
        )
    return setting


def find_compiler(device: str) -> Optional[str]:
    """What torch.compile generates code with on `device`: the C++ compiler or Triton; None where it is missing."""
    if device == "cpu":
        return shutil.which(os.environ.get("CXX", "g++"))
    try:
        import triton
    except ImportError:
        return None
    return triton.__name__


def wants_compile(setting: str, device: str) -> Tuple[bool, str]:
    if setting == "on" and not hasattr(nn.Module, "compile"):
        raise InputError(
            f'training.compile is "on", but torch {torch.__version__} has no Module.compile. Install '
            'requirements.txt, or set training.compile to "auto"'
        )
    compiler = find_compiler(device)
    missing = f"no {'C++ compiler (g++, or CXX)' if device == 'cpu' else 'Triton'}"
    if setting == "on" and compiler is None:
        raise InputError(
            f'training.compile is "on", but there is {missing}. Install it, or set training.compile to "auto"'
        )
    # On the CPU a compiled layer is no faster than the library calls it replaces, and takes 15 s to compile.
    if setting == "on" or (setting == "auto" and device == "cuda" and compiler):
        return True, "encoder layers compiled"
    return False, f"not compiled ({missing})" if setting == "auto" and device == "cuda" else "not compiled"
