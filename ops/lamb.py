"""LAMB without bias correction, as the recipe uses it (arXiv 1904.00962, algorithm 2, bias correction left out).

For one parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = m / (sqrt(v) + eps) + decay w
    w = w - lr * ratio * u         ratio = ||w|| / ||u||, 1 where either norm is 0 or the group has no trust ratio

In a group of several `trust_ratio_slices`, each of that many equal slices of a parameter's first dimension is a w with
a ratio of its own, in every form.

An update is skipped as a whole where a gradient is not finite. The fast forms, in C++ (lamb.cpp) and Triton
(lamb_triton.py), take all parameters at once; they write no update to memory, but compute it again once its norm is
known.
"""

import ctypes
import importlib.util
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple, Union

import torch

from ops.native import native, pointer

__all__ = ["Lamb", "lamb_groups", "lamb_native", "lamb_plain"]


def lamb_groups(
    named_parameters: Iterable[Tuple[str, torch.nn.Parameter]], weight_decay: float, slices: int = 1
) -> List[Dict[str, Any]]:
    """The recipe's groups: matrices and embeddings decay; biases neither decay nor have a trust ratio (the LayerNorms'
    among them); LayerNorm weights do not decay and have one. Each group lists its parameters' names beside them. With
    several `slices`, the word embedding, which the decoder is tied to, has a group of its own with so many trust
    ratios."""
    groups: List[Dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay, "trust_ratio": True},
        {"params": [], "names": [], "weight_decay": 0.0, "trust_ratio": False},
        {"params": [], "names": [], "weight_decay": 0.0, "trust_ratio": True},
    ]
    if slices > 1:
        groups.append({**groups[0], "params": [], "names": [], "trust_ratio_slices": slices})
    for name, parameter in named_parameters:
        kind = 1 if name.endswith("bias") else 2 if "LayerNorm" in name else 0
        if slices > 1 and name.endswith("word_embeddings.weight"):
            kind = 3
        groups[kind]["params"].append(parameter)
        groups[kind]["names"].append(name)
    return groups


class Lamb(torch.optim.Optimizer):
    """LAMB over groups with `lr`, `betas`, `eps`, `weight_decay`, `trust_ratio` and `trust_ratio_slices`, all on one
    device.

    `implementation` is "native" (C++, for the CPU), "triton" (for CUDA), "plain", or "auto": Triton on CUDA and C++ on
    the CPU, where they are there, else plain. The first two take contiguous float32 tensors and raise ValueError for
    others.

    State per parameter: `exp_avg` (m) and `exp_avg_sq` (v). `skipped` counts, on the device, the updates that were
    skipped because a gradient was not finite; weights, moments and compute weights are then as they were.
    `compute_weights` maps parameters to bfloat16 tensors of their shapes, which each update fills with the weights
    rounded to nearest even.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas=(0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
        trust_ratio_slices: int = 1,
        implementation: str = "auto",
    ):
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, trust_ratio=trust_ratio)
        super().__init__(params, dict(defaults, trust_ratio_slices=trust_ratio_slices))
        device = self.param_groups[0]["params"][0].device
        self.compute_weights: Dict[torch.Tensor, torch.Tensor] = {}
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.implementation = _choose(implementation, device)
        self._update: Callable[..., None] = lamb_plain if self.implementation == "plain" else lamb_native
        if self.implementation == "triton":
            from ops.lamb_triton import LambTriton

            self._update = LambTriton()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [(w, group) for group in self.param_groups for w in group["params"] if w.grad is not None]
        members = [(w, group) for w, group in members if w.numel()]
        if not members:
            return loss
        weights, groups = zip(*members)
        for w in weights:
            if not self.state[w]:
                self.state[w] = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        moments = ([self.state[w][key] for w in weights] for key in ("exp_avg", "exp_avg_sq"))
        tensors = weights, [w.grad for w in weights], *moments, [self.compute_weights.get(w) for w in weights]
        if self.implementation != "plain":
            self._check(tensors)
        self._update(*self._sliced(*tensors, groups), self.skipped)
        if self.implementation != "plain":
            for w in weights:  # so that autograd notices; torch 2.0 has no increment_version
                w.view(-1)[:0].zero_()
        return loss

    def _check(self, tensors) -> None:
        """Raises ValueError, with the parameter's name, for what the kernels would read or write wrongly."""
        device = self.skipped.device

        def fits(tensor, dtype, shape):
            return (tensor.dtype, tensor.device, tensor.shape) == (dtype, device, shape) and tensor.is_contiguous()

        for w, *others, rounded in zip(*tensors):
            if not all(fits(tensor, torch.float32, w.shape) for tensor in (w, *others)):
                raise ValueError(
                    f"{self._name(w)}: {self.implementation} LAMB takes contiguous float32 tensors on {device} for "
                    f"weight, gradient and moments, not {', '.join(map(_describe, (w, *others)))}. "
                    'Lamb(..., implementation="plain") takes others'
                )
            if rounded is not None and not fits(rounded, torch.bfloat16, w.shape):
                raise ValueError(
                    f"{self._name(w)}: its compute weight has to be a contiguous bfloat16 tensor on {device} of shape "
                    f"{tuple(w.shape)}, not {_describe(rounded)}"
                )

    def _sliced(self, *columns: Sequence) -> List[List]:
        """The columns, tensors and last their groups, with a row for each slice that has a trust ratio of its own.

        Raises ValueError, with the parameter's name, where a first dimension is not to be cut into equal slices.
        """
        rows: List[Tuple] = []
        for *tensors, group in zip(*columns):
            w, slices = tensors[0], group["trust_ratio_slices"]
            if slices == 1:
                rows.append((*tensors, group))
                continue
            if w.dim() == 0 or len(w) % slices:
                raise ValueError(
                    f"{self._name(w)}: trust_ratio_slices is {slices}, expected a divisor of the first dimension of "
                    f"its shape {tuple(w.shape)}"
                )
            parts = [[None] * slices if tensor is None else tensor.chunk(slices) for tensor in tensors]
            rows.extend((*row, group) for row in zip(*parts))
        return [list(column) for column in zip(*rows)]

    def _name(self, weight: torch.Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for i, w in enumerate(group["params"]):
                if w is weight:
                    return group["names"][i] if "names" in group else f"parameter {i} of group {number}"
        raise KeyError(weight)


def _choose(implementation: str, device: torch.device) -> str:
    known = ("auto", "native", "triton", "plain")
    if implementation not in known:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(known)}")
    if implementation == "auto" and device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else "plain"
    has_native = implementation in ("auto", "native") and device.type == "cpu" and native() is not None
    if implementation == "auto":  # the kernels are built here, not in the first update
        return "native" if has_native else "plain"
    if implementation == "native" and not has_native:
        reason = f"the parameters are on {device}" if device.type != "cpu" else "the C++ kernels cannot be built"
        raise ValueError(f'implementation is "native", but {reason}; "auto" takes what there is')
    return implementation


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"


def lamb_plain(
    weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups: Sequence[Dict[str, Any]], skipped
) -> None:
    """Updates weights and moments in place, and fills the compute weights (None where a parameter has none); where a
    gradient is not finite it only adds 1 to `skipped`. `groups` has each parameter's group.

    One parameter after the other: the fast forms are tested against it.
    """
    if not torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all():
        skipped += 1
        return
    for w, g, m, v, rounded, group in zip(weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups):
        beta1, beta2 = group["betas"]
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w
        ratio: Union[float, torch.Tensor] = 1.0
        if group["trust_ratio"]:
            w_norm, u_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
            ratio = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, torch.ones_like(w_norm))
        w.sub_(group["lr"] * ratio * u)
        if rounded is not None:
            rounded.copy_(w)


class _Parameter(ctypes.Structure):  # as ops/lamb.cpp declares it
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "exp_avg", "exp_avg_sq", "compute_weight")),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay")),
        ("trust_ratio", ctypes.c_int64),
    ]


def lamb_native(
    weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups: Sequence[Dict[str, Any]], skipped
) -> None:
    """The same in C++, on all cores."""
    table = (_Parameter * len(weights))()
    for i, (*tensors, group) in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups)):
        options = group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["trust_ratio"]
        table[i] = _Parameter(*map(pointer, tensors), weights[i].numel(), *options)
    library = native()
    assert library is not None, "lamb_native needs the C++ kernels"
    skipped += library.lamb(table, ctypes.c_int64(len(table)), torch.get_num_threads())
