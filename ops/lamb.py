"""LAMB without bias correction, as the recipe uses it (arXiv 1904.00962, algorithm 2, bias correction left out).

For one parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = m / (sqrt(v) + eps) + decay w
    w = w - lr * ratio * u         ratio = ||w|| / ||u||, 1 where either norm is 0 or the group has no trust ratio
"""

from typing import Dict, Iterable, List, Tuple

import torch

__all__ = ["Lamb", "lamb_foreach", "lamb_groups", "lamb_plain"]


def lamb_groups(named_parameters: Iterable[Tuple[str, torch.nn.Parameter]], weight_decay: float) -> List[Dict]:
    """The recipe's groups: matrices and embeddings decay; biases neither decay nor have a trust ratio (the LayerNorms' among
    them); LayerNorm weights do not decay and have one. Each group lists its parameters' names beside them."""
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
    """LAMB over groups with `lr`, `betas`, `eps`, `weight_decay` and `trust_ratio`; gradients and moments in float32.

    State per parameter: `exp_avg` (m) and `exp_avg_sq` (v). `foreach=False` updates one parameter after the other.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
                 trust_ratio: bool = True, foreach: bool = True):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, trust_ratio=trust_ratio))
        self._update = lamb_foreach if foreach else lamb_plain

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None and w.numel() > 0]
            if not weights:
                continue
            for w in weights:
                if not self.state[w]:
                    self.state[w] = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
            self._update(weights, [w.grad for w in weights], [self.state[w]["exp_avg"] for w in weights],
                         [self.state[w]["exp_avg_sq"] for w in weights], group["lr"], group["betas"], group["eps"],
                         group["weight_decay"], group["trust_ratio"])
        return loss


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
