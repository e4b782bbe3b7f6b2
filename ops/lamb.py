"""LAMB without bias correction, as the recipe uses it (arXiv 1904.00962, algorithm 2, bias correction left out).

For one parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = m / (sqrt(v) + eps) + decay w
    w = w - lr * ratio * u         ratio = ||w|| / ||u||, 1 where either norm is 0 or the group has no trust ratio

In a group of several `trust_ratio_slices`, each of that many equal slices of a parameter's first dimension is a w with
a ratio of its own, in every form.

Where processes have parts of the parameters, a norm is over all parts: one sum over the processes, for all parameters
together, tells the norms, and whether another process skips the update.

An update is skipped as a whole where a gradient is not finite. The fast forms, in C++ (lamb.cpp) and Triton
(lamb_triton.py), take all parameters at once; they write no update to memory, but compute it again once its norm is
known.
"""

import ctypes
import importlib.util
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch

from ops.native import native, pointer
from ops.shards import is_dtensor, local_part, place_of

__all__ = ["Lamb", "SumAcross", "lamb_groups", "lamb_native", "lamb_plain"]

SumAcross = Callable[[torch.Tensor], None]


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

    Parameters may be DTensors, of which each process holds a part, with gradients and compute weights alike (or, for
    compute weights, the local parts); the state is DTensors, too. `sum_across` has to be set then. In each step it is
    called once, with a float64 tensor on the parameters' device, which it makes the sum over the processes: of each
    parameter (or slice) with a gradient the square of the weight's norm, then of each that of the update's, and last a
    value that is above 0 where a gradient is not finite. Those processes have gradients for the same parameters.
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
        self.sum_across: Optional[SumAcross] = None
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
        members = [(w, group) for w, group in members if w.numel() or self.sum_across]  # which has a row for each
        if not members and self.sum_across is None:
            return loss
        weights, groups = [w for w, _ in members], [group for _, group in members]
        for w in weights:
            if not self.state[w]:
                self.state[w] = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        moments = ([self.state[w][key] for w in weights] for key in ("exp_avg", "exp_avg_sq"))
        tensors = [weights, [w.grad for w in weights], *moments, [self.compute_weights.get(w) for w in weights]]
        if any(map(is_dtensor, weights)):
            tensors = [[local_part(tensor) for tensor in column] for column in tensors]
        if self.implementation != "plain":
            self._check(weights, *tensors)
        self._update(*self._sliced(weights, *tensors, groups), self.skipped, self.sum_across)
        if self.implementation != "plain":
            for w in tensors[0]:  # so that autograd notices; torch 2.0 has no increment_version
                w.view(-1)[:0].zero_()
        return loss

    def _check(self, *columns: Sequence) -> None:
        """Raises ValueError, with the parameter's name, for what the kernels would read or write wrongly."""
        device = self.skipped.device

        def fits(tensor, dtype, shape):
            return (tensor.dtype, tensor.device, tensor.shape) == (dtype, device, shape) and tensor.is_contiguous()

        for parameter, w, *others, rounded in zip(*columns):
            if not all(fits(tensor, torch.float32, w.shape) for tensor in (w, *others)):
                raise ValueError(
                    f"{self._name(parameter)}: {self.implementation} LAMB takes contiguous float32 tensors on "
                    f"{device} for weight, gradient and moments, not {', '.join(map(_describe, (w, *others)))}. "
                    'Lamb(..., implementation="plain") takes others'
                )
            if rounded is not None and not fits(rounded, torch.bfloat16, w.shape):
                raise ValueError(
                    f"{self._name(parameter)}: its compute weight has to be a contiguous bfloat16 tensor on {device} "
                    f"of shape {tuple(w.shape)}, not {_describe(rounded)}"
                )

    def _sliced(self, weights: Sequence[torch.Tensor], *columns: Sequence) -> List[List]:
        """The columns, of which the last are the weights' groups and the others their local parts, with a row for each
        slice that has a trust ratio of its own, if this process has nothing of it, too.

        Raises ValueError, with the parameter's name, where a first dimension is not to be cut into equal slices.
        """
        rows: List[Tuple] = []
        for w, *tensors, group in zip(weights, *columns):
            slices = group["trust_ratio_slices"]
            if slices == 1:
                rows.append((*tensors, group))
                continue
            first, whole = place_of(w) if w.dim() else (0, 1)
            if whole % slices:
                raise ValueError(
                    f"{self._name(w)}: trust_ratio_slices is {slices}, expected a divisor of the first dimension of "
                    f"its shape {tuple(w.shape)}"
                )
            size, last = whole // slices, first + len(tensors[0])
            own = [len(range(max(first, begin), min(last, begin + size))) for begin in range(0, whole, size)]
            parts = [[None] * slices if tensor is None else tensor.split(own) for tensor in tensors]
            rows.extend((*row, group) for row in zip(*parts))
        return [list(column) for column in zip(*rows)] or [[] for _ in columns]

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
    weights,
    gradients,
    exp_avgs,
    exp_avg_sqs,
    compute_weights,
    groups: Sequence[Dict[str, Any]],
    skipped,
    sum_across: Optional[SumAcross] = None,
) -> None:
    """Updates weights and moments in place, and fills the compute weights (None where a parameter has none); where a
    gradient is not finite it only adds 1 to `skipped`. `groups` has each parameter's group. With `sum_across` (see
    Lamb) the tensors are parts, which may be empty.

    One parameter after the other: the fast forms are tested against it.
    """
    tensors = list(zip(weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups))
    if sum_across is not None:
        return _plain_across(tensors, skipped, sum_across)
    if not torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all():
        skipped += 1
        return
    for w, g, m, v, rounded, group in tensors:
        u = _updated(w, g, m, v, group)
        _apply(w, u, rounded, group, torch.linalg.vector_norm(w), torch.linalg.vector_norm(u))


def _plain_across(tensors: List[Tuple], skipped, sum_across: SumAcross) -> None:
    moments = [(m.clone(), v.clone()) for _, _, m, v, _, _ in tensors]
    updates = [_updated(w, g, *own, group) for (w, g, *_, group), own in zip(tensors, moments)]
    squares = [part.double().square().sum() for part in [*(w for w, *_ in tensors), *updates]]
    infinite = sum(((~g.isfinite()).sum() for _, g, *_ in tensors), torch.zeros_like(skipped))
    sums = torch.stack([*squares, infinite.double()])
    sum_across(sums)
    if sums[-1] > 0:
        skipped += 1
        return
    norms = sums[:-1].sqrt().view(2, -1).unbind(1)
    for (w, _, m, v, rounded, group), (new_m, new_v), u, (w_norm, u_norm) in zip(tensors, moments, updates, norms):
        m.copy_(new_m)
        v.copy_(new_v)
        _apply(w, u, rounded, group, w_norm, u_norm)


def _updated(w, g, m, v, group: Dict[str, Any]) -> torch.Tensor:
    """The update, with moments that become the new ones."""
    beta1, beta2 = group["betas"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w


def _apply(w, u, rounded, group: Dict[str, Any], w_norm: torch.Tensor, u_norm: torch.Tensor) -> None:
    ratio: Union[float, torch.Tensor] = 1.0
    if group["trust_ratio"]:
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
    weights,
    gradients,
    exp_avgs,
    exp_avg_sqs,
    compute_weights,
    groups: Sequence[Dict[str, Any]],
    skipped,
    sum_across: Optional[SumAcross] = None,
) -> None:
    """The same in C++, on all cores."""
    table = (_Parameter * len(weights))()
    for i, (*tensors, group) in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, compute_weights, groups)):
        options = group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["trust_ratio"]
        table[i] = _Parameter(*map(pointer, tensors), weights[i].numel(), *options)
    library = native()
    assert library is not None, "lamb_native needs the C++ kernels"
    arguments = table, ctypes.c_int64(len(table)), torch.get_num_threads()
    if sum_across is None:
        skipped += library.lamb(*arguments)
        return
    sums = torch.empty(2 * len(table) + 1, dtype=torch.float64)
    library.lamb_sums(*arguments, pointer(sums))
    sum_across(sums)
    if sums[-1] > 0:
        skipped += 1
    else:
        library.lamb_write(*arguments, pointer(sums))
