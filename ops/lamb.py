"""LAMB without bias correction, as the recipe uses it (arXiv 1904.00962, algorithm 2, bias correction left out).

For one parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = m / (sqrt(v) + eps) + decay w
    w = w - lr * ratio * u         ratio = ||w|| / ||u||, 1 where either norm is 0 or the group has no trust ratio

An update is skipped as a whole where a gradient is not finite. The fast forms, in C++ (lamb.cpp) and Triton
(lamb_triton.py), take all parameters at once; they write no update to memory, but compute it again once its norm is
known.
"""

import ctypes
import importlib.util
from typing import Dict, Iterable, List, Optional, Tuple

import torch

from ops.native import native, pointer

__all__ = ["Lamb", "lamb_foreach", "lamb_groups", "lamb_native", "lamb_plain"]


def lamb_groups(named_parameters: Iterable[Tuple[str, torch.nn.Parameter]], weight_decay: float) -> List[Dict]:
    """The recipe's groups: matrices and embeddings decay; biases neither decay nor have a trust ratio (the LayerNorms'
    among them); LayerNorm weights do not decay and have one. Each group lists its parameters' names beside them."""
    groups = [
        {"params": [], "names": [], "weight_decay": weight_decay, "trust_ratio": True},
        {"params": [], "names": [], "weight_decay": 0.0, "trust_ratio": False},
        {"params": [], "names": [], "weight_decay": 0.0, "trust_ratio": True},
    ]
    for name, parameter in named_parameters:
        kind = 1 if name.endswith("bias") else 2 if "LayerNorm" in name else 0
        groups[kind]["params"].append(parameter)
        groups[kind]["names"].append(name)
    return groups


class Lamb(torch.optim.Optimizer):
    """LAMB over groups with `lr`, `betas`, `eps`, `weight_decay` and `trust_ratio`, all on one device.

    `implementation` is "native" (C++, for the CPU), "triton" (for CUDA), "foreach", "plain", or "auto": Triton on CUDA
    and C++ on the CPU, where they are there, else foreach. The first two take contiguous float32 tensors and raise
    ValueError for others.

    State per parameter: `exp_avg` (m) and `exp_avg_sq` (v). `skipped` counts, on the device, the updates that were
    skipped because a gradient was not finite; weights, moments and copies are then as they were. `copies` maps
    parameters to bfloat16 tensors of their shapes, which each update fills with the weights rounded to nearest even.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas=(0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
        implementation: str = "auto",
    ):
        super().__init__(
            params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, trust_ratio=trust_ratio)
        )
        device = self.param_groups[0]["params"][0].device
        self.copies: Dict[torch.Tensor, torch.Tensor] = {}
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.implementation = _choose(implementation, device)
        if self.implementation == "triton":
            from ops.lamb_triton import LambTriton

            self._fused = LambTriton()
        else:
            self._fused = lamb_native

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            (group, [w for w in group["params"] if w.grad is not None and w.numel() > 0]) for group in self.param_groups
        ]
        weights = [w for _, members in groups for w in members]
        if not weights:
            return loss
        for w in weights:
            if not self.state[w]:
                self.state[w] = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        if self.implementation in ("native", "triton"):
            tensors = self._tensors(weights)
            self._check(weights, tensors)
            self._fused(
                *tensors,
                [self.copies.get(w) for w in weights],
                [group for group, members in groups for _ in members],
                self.skipped,
            )
            for w in weights:  # so that autograd notices; torch 2.0 has no increment_version
                w.view(-1)[:0].zero_()
        elif not torch.stack(torch._foreach_norm([w.grad for w in weights], float("inf"))).isfinite().all():
            self.skipped += 1
        else:
            update = lamb_foreach if self.implementation == "foreach" else lamb_plain
            for group, members in groups:
                if members:
                    update(
                        *self._tensors(members),
                        group["lr"],
                        group["betas"],
                        group["eps"],
                        group["weight_decay"],
                        group["trust_ratio"],
                    )
            for w in weights:
                if w in self.copies:
                    self.copies[w].copy_(w)
        return loss

    def _tensors(self, weights) -> Tuple[List, List, List, List]:
        states = [self.state[w] for w in weights]
        return (
            weights,
            [w.grad for w in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )

    def _check(self, weights, tensors) -> None:
        """Raises ValueError, with the parameter's name, for what the kernels would read or write wrongly."""
        expected = (torch.float32, self.skipped.device)
        for w, *others in zip(*tensors):
            copy = self.copies.get(w)
            if not all(
                (t.dtype, t.device) == expected and t.shape == w.shape and t.is_contiguous() for t in (w, *others)
            ):
                raise ValueError(
                    f"{self._name(w)}: {self.implementation} LAMB takes contiguous float32 tensors on "
                    f"{expected[1]} for weight, gradient and moments, not "
                    f'{", ".join(map(_describe, (w, *others)))}. Lamb(..., implementation="foreach") takes '
                    "others"
                )
            if copy is not None and not (
                (copy.dtype, copy.device) == (torch.bfloat16, expected[1])
                and copy.shape == w.shape
                and copy.is_contiguous()
            ):
                raise ValueError(
                    f"{self._name(w)}: its copy has to be a contiguous bfloat16 tensor on {expected[1]} of "
                    f"shape {tuple(w.shape)}, not {_describe(copy)}"
                )

    def _name(self, weight) -> str:
        for number, group in enumerate(self.param_groups):
            for i, w in enumerate(group["params"]):
                if w is weight:
                    return group["names"][i] if "names" in group else f"parameter {i} of group {number}"
        raise KeyError(weight)


def _choose(implementation: str, device: torch.device) -> str:
    known = ("auto", "native", "triton", "foreach", "plain")
    if implementation not in known:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(known)}")
    if implementation == "auto":
        # Built here, not in the first update.
        if device.type == "cuda":
            return "triton" if importlib.util.find_spec("triton") else "foreach"
        return "native" if device.type == "cpu" and native() else "foreach"
    if implementation == "native" and (device.type != "cpu" or native() is None):
        raise ValueError(
            'implementation is "native", but %s; "auto" takes what there is'
            % ("the parameters are on %s" % device if device.type != "cpu" else "the C++ kernels cannot be built")
        )
    return implementation


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"


def lamb_plain(weights, gradients, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, trust_ratio) -> None:
    """Updates weights and moments in place, one parameter after the other: what the fast forms are held to."""
    beta1, beta2 = betas
    for w, g, m, v in zip(weights, gradients, exp_avgs, exp_avg_sqs):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = m / (v.sqrt() + eps) + weight_decay * w
        ratio = 1.0
        if trust_ratio:
            w_norm, u_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
            ratio = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, torch.ones_like(w_norm))
        w.sub_(lr * ratio * u)


def lamb_foreach(weights, gradients, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, trust_ratio) -> None:
    """The same, each operation over all parameters at once."""
    beta1, beta2 = betas
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)
    updates = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(updates, eps)
    updates = torch._foreach_div(exp_avgs, updates)
    if weight_decay:
        torch._foreach_add_(updates, weights, alpha=weight_decay)
    if not trust_ratio:
        torch._foreach_add_(weights, updates, alpha=-lr)
        return
    w_norms, u_norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
    ratios = torch.where((w_norms > 0) & (u_norms > 0), w_norms / u_norms, torch.ones_like(w_norms))
    torch._foreach_mul_(updates, list(ratios.mul(-lr).unbind()))
    torch._foreach_add_(weights, updates)


class _Parameter(ctypes.Structure):  # as ops/lamb.cpp declares it
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("weight", "gradient", "exp_avg", "exp_avg_sq", "copy")]
        + [("size", ctypes.c_int64)]
        + [(name, ctypes.c_double) for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay")]
        + [("trust_ratio", ctypes.c_int64)]
    )


def lamb_native(
    weights, gradients, exp_avgs, exp_avg_sqs, copies: List[Optional[torch.Tensor]], groups: List[Dict], skipped
) -> None:
    """The same in C++, over parameters of all groups: `groups` has each parameter's. Fills the copies, and counts in
    `skipped`."""
    table = (_Parameter * len(weights))(
        *(
            (
                pointer(w),
                pointer(g),
                pointer(m),
                pointer(v),
                pointer(copy),
                w.numel(),
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                group["trust_ratio"],
            )
            for w, g, m, v, copy, group in zip(weights, gradients, exp_avgs, exp_avg_sqs, copies, groups)
        )
    )
    skipped += native().lamb(table, ctypes.c_int64(len(table)), torch.get_num_threads())
