"""PopTorch's optimizers, and their state by the parameters' names.

Another of PopTorch's optimizers is one more entry of IPU_OPTIMIZERS and of STATE.
"""

import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

import torch
from torch.nn import Parameter

from bert.config import Config
from bert.optimizers import check_state
from data.errors import InputError
from ops.lamb import lamb_groups

__all__ = ["IPU_OPTIMIZERS", "STATE", "check_ipu_state", "make_ipu_optimizer", "read_state", "write_state"]

Tensors = Mapping[str, torch.Tensor]


def make_lamb(optim, groups: List[Dict[str, Any]], **options):
    """poptorch.optim.LAMB without bias correction."""
    for group in groups:
        if not group.pop("trust_ratio"):
            group["max_weight_norm"] = 0.0  # PopART's ratio is then 1
    optimizer = optim.LAMB(groups, bias_correction=False, **options)
    optimizer.variable_attrs.markAsConstant("max_weight_norm")
    return optimizer


def make_adamw(optim, groups: List[Dict[str, Any]], **options):
    """poptorch.optim.AdamW, in LAMB's groups."""
    for group in groups:
        del group["trust_ratio"]
    return optim.AdamW(groups, bias_correction=True, **options)


IPU_OPTIMIZERS: Dict[str, Callable[..., Any]] = {"lamb": make_lamb, "adamw": make_adamw}
# What an optimizer keeps for a parameter -> PopART's prefix of it. Steps are counted where a bias is corrected.
MOMENTS = {"exp_avg": "Accl1___", "exp_avg_sq": "Accl2___"}
STATE = {"lamb": MOMENTS, "adamw": {**MOMENTS, "step": "Step___"}}


def make_ipu_optimizer(poptorch, named_parameters: Iterable[Tuple[str, Parameter]], config: Config, half: bool):
    """The optimizer of PopTorch that `config` names. Raises InputError where PopTorch has none."""
    optimizer, ipu, accumulated = config.optimizer, config.ipu, torch.float16 if half else torch.float32
    if optimizer.name not in IPU_OPTIMIZERS:
        raise InputError(
            f'optimizer.name is "{optimizer.name}", and IPUs have {", ".join(IPU_OPTIMIZERS)}. Take one of them, or '
            "train on CUDA or the CPU: --device cuda or --device cpu"
        )
    groups = lamb_groups(named_parameters, optimizer.weight_decay)
    for group in groups:
        del group["names"]
    made = IPU_OPTIMIZERS[optimizer.name](
        poptorch.optim,
        groups,
        lr=0.0,
        betas=tuple(optimizer.betas),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        loss_scaling=ipu.loss_scaling if half else 1.0,
        accum_type=accumulated,
        first_order_momentum_accum_type=accumulated if ipu.enable_half_first_order_momentum else torch.float32,
        second_order_momentum_accum_type=torch.float32,
    )
    made.variable_attrs.markAsConstant("weight_decay")
    return made


def check_ipu_state(name: str, tensors: Tensors, parameters: Tensors) -> None:
    """Raises InputError where `tensors` are not the state of the optimizer of this name."""
    shapes = {key: shapes_of(key, parameters) for key in STATE[name]}
    check_state(name, tensors, {f"{owner}.{key}": shapes[key][owner] for owner in parameters for key in shapes})


def shapes_of(key: str, parameters: Tensors) -> Dict[str, torch.Size]:
    return {name: torch.Size() if key == "step" else parameter.shape for name, parameter in parameters.items()}


def read_state(name: str, state: Tensors, parameters: Tensors) -> Dict[str, torch.Tensor]:
    """PopART's state of the optimizer of this name -> {"<parameter name>.<key>": float32 tensor}, as
    bert/optimizers.py has it."""
    tensors = {}
    for key, prefix in STATE[name].items():
        shapes = shapes_of(key, parameters)
        for owner, (places, transposed) in places_of(state, prefix, shapes).items():
            parts = [state[place].float().t() if transposed else state[place].float() for place in places]
            whole = torch.cat(parts) if len(parts) > 1 and shapes[owner] else parts[0].clone()
            tensors[f"{owner}.{key}"] = whole.reshape(shapes[owner])
    return tensors


def write_state(name: str, state: Tensors, tensors: Tensors, parameters: Tensors) -> Dict[str, torch.Tensor]:
    """`state` with the values of `tensors`, each in the shape and type that PopART has: it reads them by their address.

    What `tensors` lack stays as it is.
    """
    written = dict(state)
    for key, prefix in STATE[name].items():
        for owner, (places, transposed) in places_of(state, prefix, shapes_of(key, parameters)).items():
            whole = tensors.get(f"{owner}.{key}")
            if whole is None:
                continue
            parts = whole.chunk(len(places)) if len(places) > 1 and whole.dim() else [whole] * len(places)
            for place, part in zip(places, parts):
                part = part.t() if transposed else part.reshape(state[place].shape)
                written[place] = part.to(state[place].dtype).contiguous()
    return written


def places_of(state: Tensors, prefix: str, shapes: Mapping[str, torch.Size]) -> Dict[str, Tuple[List[str], bool]]:
    """Parameter name -> (the state's names of what is kept for it, whether those tensors are transposed).

    The one weight whose product is serialized has its state in parts, "<product>", "<product>/1", "<product>/2" and so
    on, which are rows of it or, as the product takes them, columns. Raises InputError for anything else, rather than
    guess.
    """
    there = [key for key in state if key.startswith(prefix)]
    places = {name: [key for key in there if key.endswith("." + name)] for name in shapes}
    known = {key for keys in places.values() for key in keys}
    parts, missing = [key for key in there if key not in known], [name for name, keys in places.items() if not keys]
    if len(missing) == 1:
        products = {re.sub(r"/\d+$", "", key) for key in parts}
        places[missing[0]] = [product + (f"/{i}" if i else "") for product in products for i in range(len(parts))]
    transposed = {name: orientation([state.get(key) for key in keys], shapes[name]) for name, keys in places.items()}
    odd = [name for name, is_transposed in transposed.items() if is_transposed is None]
    if len(missing) > 1 or (parts and not missing) or odd:
        wrong = missing or odd or ["no parameter"]
        tensors = ", ".join(f"{key} {list(state[key].shape)}" for key in parts or places[wrong[0]]) or "nothing"
        raise InputError(
            f"the optimizer's state on the IPU has {tensors} for {', '.join(wrong)}, expected one tensor for each "
            "parameter, or equal parts of one serialized weight. Please report it with the versions of PopTorch and of "
            "the Poplar SDK; ipu.embedding_serialization_factor 1 avoids it"
        )
    return {name: (keys, bool(transposed[name])) for name, keys in places.items()}


def orientation(tensors: List[Optional[torch.Tensor]], shape: torch.Size) -> Optional[bool]:
    """Whether these tensors, row after row, are transposed to make one of `shape`; None where they make none, or it is
    open. Each of them is whole where `shape` is that of a number."""
    parts = [tensor for tensor in tensors if tensor is not None]
    if not parts or len(parts) < len(tensors) or any(part.shape != parts[0].shape for part in parts):
        return None
    first = parts[0]
    if not shape:
        return False if first.numel() == 1 else None
    if len(parts) == 1:
        return False if first.shape == shape else None
    rows, columns = shape[0] / len(parts), shape[1]
    fits = [first.shape == (rows, columns), first.shape == (columns, rows)]
    return fits[1] if sum(fits) == 1 else None
