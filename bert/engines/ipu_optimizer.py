"""PopTorch's optimizer, and its state by the parameters' names."""

import re
from typing import Dict, List, Optional, Tuple

import torch

from bert.config import IpuConfig
from data.errors import InputError
from ops.lamb import lamb_groups

__all__ = ["make_optimizer", "read_moments", "write_moments"]

MOMENTS = {"exp_avg": "Accl1___", "exp_avg_sq": "Accl2___"}  # PopART's prefixes of the optimizer's state


def make_optimizer(poptorch, named_parameters, ipu: IpuConfig, half: bool, weight_decay: float, betas, eps: float):
    groups = []
    for group in lamb_groups(named_parameters, weight_decay):
        groups.append({"params": group["params"], "weight_decay": group["weight_decay"]})
        if not group["trust_ratio"]:
            groups[-1]["max_weight_norm"] = 0.0  # PopART's ratio is then 1
    half_type = torch.float16 if half else torch.float32
    optimizer = poptorch.optim.LAMB(
        groups,
        lr=0.0,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=False,
        loss_scaling=ipu.loss_scaling if half else 1.0,
        accum_type=half_type,
        first_order_momentum_accum_type=half_type if ipu.enable_half_first_order_momentum else torch.float32,
        second_order_momentum_accum_type=torch.float32,
    )
    for name in ("weight_decay", "max_weight_norm"):
        optimizer.variable_attrs.markAsConstant(name)
    return optimizer


def read_moments(state: Dict[str, torch.Tensor], parameters: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """PopART's optimizer state -> {"<parameter name>.exp_avg", ".exp_avg_sq": float32 tensor of the parameter's
    shape}."""
    moments = {}
    for key, prefix in MOMENTS.items():
        for name, (keys, transposed) in parts_of(state, prefix, parameters).items():
            parts = [state[one].float().t() if transposed else state[one].float() for one in keys]
            moments[f"{name}.{key}"] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    return moments


def write_moments(
    state: Dict[str, torch.Tensor], moments: Dict[str, torch.Tensor], parameters: Dict[str, torch.Tensor]
) -> Dict:
    """`state` with the values of `moments`, each in the shape and type that PopART has: it reads them by their
    address."""
    written = dict(state)
    for key, prefix in MOMENTS.items():
        for name, (keys, transposed) in parts_of(state, prefix, parameters).items():
            moment = moments[f"{name}.{key}"]
            for one, part in zip(keys, moment.chunk(len(keys)) if len(keys) > 1 else [moment]):
                written[one] = (part.t() if transposed else part).to(state[one].dtype).contiguous()
    return written


def parts_of(
    state: Dict[str, torch.Tensor], prefix: str, parameters: Dict[str, torch.Tensor]
) -> Dict[str, Tuple[List[str], bool]]:
    """Parameter name -> (the state's names of its moment, whether those tensors are transposed).

    The one weight whose product is serialized has its moment in parts, "<product>", "<product>/1", "<product>/2" and so
    on, which are rows of it or, as the product takes them, columns. Raises InputError for anything else, rather than
    guess.
    """
    there = [key for key in state if key.startswith(prefix)]
    found = {name: [key for key in there if key.endswith("." + name)] for name in parameters}
    known = {key for keys in found.values() for key in keys}
    parts, missing = [key for key in there if key not in known], [name for name, keys in found.items() if not keys]
    if len(missing) == 1:
        products = {re.sub(r"/\d+$", "", key) for key in parts}
        found[missing[0]] = [product + (f"/{i}" if i else "") for product in products for i in range(len(parts))]
    placed = {
        name: (keys, orientation([state.get(key) for key in keys], parameters[name].shape))
        for name, keys in found.items()
    }
    if len(missing) > 1 or (parts and not missing) or any(transposed is None for _, transposed in placed.values()):
        wrong = missing or [name for name, (_, transposed) in placed.items() if transposed is None] or ["no parameter"]
        raise InputError(
            "the optimizer's state on the IPU has %s for %s, expected one tensor for each parameter, or equal parts of one "
            "serialized weight. Please report it with the versions of PopTorch and of the Poplar SDK; "
            "ipu.embedding_serialization_factor 1 avoids it"
            % (
                ", ".join("%s %s" % (key, list(state[key].shape)) for key in parts or found[wrong[0]]) or "nothing",
                ", ".join(wrong),
            )
        )
    return placed


def orientation(parts: List[Optional[torch.Tensor]], shape: torch.Size) -> Optional[bool]:
    """Whether these tensors, row after row, are transposed to make one of `shape`; None where they make none, or it is
    open."""
    if not parts or any(part is None or part.shape != parts[0].shape for part in parts):
        return None
    if len(parts) == 1:
        return False if parts[0].shape == shape else None
    rows, columns = shape[0] / len(parts), shape[1]
    fits = [parts[0].shape == (rows, columns), parts[0].shape == (columns, rows)]
    return fits[1] if sum(fits) == 1 else None
