"""Optimizers by name, and what all have: named state, clipping, skipped updates, weights to compute with.

Parameters may be DTensors, of which each process holds a part (ops/shards.py). An optimizer that goes by elements then
works as it is. One that needs more of a parameter, as LAMB its norm and Muon all of a matrix, has to ask the others.

Another optimizer is one more entry, `OPTIMIZERS["mine"] = make_mine`: steps, checkpoints and resuming then work. A
maker takes the named parameters and the config's optimizer section, and returns optimizers whose groups list their
parameters' `names` beside `params`. It tells parameters apart by name and number of dimensions, not by size.
"""

import dataclasses
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from bert.config import OptimizerConfig
from data.errors import InputError
from ops.lamb import Lamb, SumAcross, lamb_groups
from ops.shards import as_part, is_dtensor, local_part, part_of, shard_like

__all__ = ["NamedOptimizer", "OPTIMIZERS", "check_state", "make_optimizer"]

NamedParameters = List[Tuple[str, Parameter]]


def make_lamb(named_parameters: NamedParameters, config: OptimizerConfig) -> List[Optimizer]:
    """LAMB without bias correction (ops/lamb.py), in the recipe's groups; the word embedding has as many trust ratios
    as the config says. Raises InputError where it says several and there is no word embedding."""
    groups = lamb_groups(named_parameters, config.weight_decay, config.trust_ratio_slices)
    if config.trust_ratio_slices > 1 and not groups[-1]["params"]:
        raise InputError(
            f"optimizer.trust_ratio_slices is {config.trust_ratio_slices}, expected 1: no parameter is named "
            "...word_embeddings.weight, which it cuts"
        )
    return [Lamb(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)]


def make_adamw(named_parameters: NamedParameters, config: OptimizerConfig) -> List[Optimizer]:
    """torch's AdamW in LAMB's groups, which say what decays; its fused form where the parameters' device has one."""
    groups = lamb_groups(named_parameters, config.weight_decay)
    options: Dict[str, Any] = dict(lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps)
    device = next(parameter.device for group in groups for parameter in group["params"])
    return [torch.optim.AdamW(groups, fused=has_fused_adamw(device), **options)]


def has_fused_adamw(device: torch.device) -> bool:
    """Whether torch has one there; some versions find out in the first step that they have none."""
    probe = torch.zeros(1, device=device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except RuntimeError:
        return False
    return True


def make_muon(named_parameters: NamedParameters, config: OptimizerConfig) -> List[Optimizer]:
    """torch's Muon, with its own momentum, for the encoder's matrices; AdamW for embeddings, heads, biases and norms.

    The encoder's matrices are the parameters of two dimensions with ".encoder." in their names. Muon's updates are
    scaled to the size of AdamW's, so that one learning rate suits both (arXiv 2502.16982).
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise InputError(
            f'optimizer.name is "muon", but torch {torch.__version__} has no Muon; 2.9 and newer do. Install '
            'requirements.txt, or set optimizer.name to "adamw"'
        )
    matrices = {name: p for name, p in named_parameters if p.dim() == 2 and ".encoder." in name}
    rest = [(name, p) for name, p in named_parameters if name not in matrices]
    optimizers = make_adamw(rest, config) if rest else []
    if matrices:
        group = {"params": list(matrices.values()), "names": list(matrices)}
        options = dict(lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        shares = any(map(is_dtensor, matrices.values()))
        optimizers.append(ShardedMuon([group], muon, options) if shares else muon([group], **options))
    return optimizers


class ShardedMuon(Optimizer):
    """torch's Muon for matrices that are DTensors. The momentum stays with the parts; what is to be orthogonalized is
    gathered, a matrix at a time, and each process does all of it and takes its part.

    torch's own orthogonalizes DTensors in place: in bfloat16 with another rounding for each number of processes, with
    some fifteen gathers, and not at all where there are more processes than rows.
    """

    def __init__(self, groups: List[Dict[str, Any]], muon: Callable[..., Optimizer], options: Dict[str, Any]):
        super().__init__(groups, muon([Parameter(torch.zeros(1, 1))], **options).defaults)
        self.muon = muon

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            without_momentum = dict(weight_decay=0.0, momentum=0.0, nesterov=False)
            options = {**{key: group[key] for key in self.defaults}, **without_momentum}
            for weight in [p for p in group["params"] if p.grad is not None]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = Parameter(torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device))
                update.grad = weight.grad.lerp(buffer, group["momentum"]).full_tensor()
                self.muon([update], **options).step()  # from zeros
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                local_part(weight).add_(part_of(update, weight))


Maker = Callable[[NamedParameters, OptimizerConfig], List[Optimizer]]
OPTIMIZERS: Dict[str, Maker] = {"lamb": make_lamb, "adamw": make_adamw, "muon": make_muon}


class NamedOptimizer:
    """The optimizers that `config` asks for, as one whose state goes by the parameters' names.

    `skipped` counts, on the parameters' device, the updates that were left out because a gradient was not finite (or
    their norm is above what float32 holds): weights, state and compute weights are then as they were. With
    `config.max_grad_norm`, gradients are clipped first, as by torch.nn.utils.clip_grad_norm_. `compute_weights` maps
    parameters to bfloat16 tensors of their shapes, which each update fills with the weights rounded to nearest even.

    With several processes whose parameters are parts, or others, `sum_across` makes a float64 tensor on the parameters'
    device the sum over these processes, so that all skip the same updates; the last value tells them, and LAMB's norms
    come before it (ops/lamb.py). `holders` says how many of them hold the same gradient, of parameters of which
    several do. All processes make the same steps. Raises ValueError for DTensors without it.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        config: OptimizerConfig,
        compute_weights: Mapping,
        sum_across: Optional[SumAcross] = None,
        holders: Mapping[str, int] = {},
    ):
        if sum_across is None and any(is_dtensor(p) for _, p in named_parameters):
            raise ValueError("parameters are DTensors: sum_across is None, expected a sum over their processes")
        self.named_parameters, self.config, self.compute_weights = named_parameters, config, dict(compute_weights)
        self.sum_across, self.holders = sum_across, holders
        self.optimizers = OPTIMIZERS[config.name](named_parameters, config)
        self.skipped = torch.zeros((), dtype=torch.int64, device=named_parameters[0][1].device)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Lamb):
                optimizer.compute_weights, optimizer.skipped = self.compute_weights, self.skipped
                optimizer.sum_across = sum_across

    def step(self, learning_rate: float) -> None:
        """One update with the gradients that the parameters have."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        if len(self.optimizers) == 1 and isinstance(self.optimizers[0], Lamb):
            if self.config.max_grad_norm:
                self.clip_gradients()
            self.optimizers[0].step()  # its kernels skip, count and round
        elif self.check_gradients():
            for optimizer in self.optimizers:
                optimizer.step()
            with torch.no_grad():
                for parameter, rounded in self.compute_weights.items():
                    local_part(rounded).copy_(local_part(parameter))

    def check_gradients(self) -> bool:
        """Counts the update as skipped where a gradient is not finite; False where it must not be made.

        Optimizers that can leave it out on the device, without a wait for it, are told there: by `found_inf`, as
        torch.amp.GradScaler tells them.
        """
        if self.sum_across is None and not self.gradients():
            return False
        broken = ~self.clip_gradients().isfinite()
        self.skipped += broken
        if not all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers):
            return not bool(broken)
        for optimizer in self.optimizers:
            vars(optimizer).update(grad_scale=None, found_inf=broken.float())
        return True

    def gradients(self) -> Dict[str, torch.Tensor]:
        """Parameter name -> its gradient, or this process's part of it; without those of which it has nothing."""
        gradients = {name: local_part(p.grad) for name, p in self.named_parameters if p.grad is not None}
        return {name: gradient for name, gradient in gradients.items() if gradient.numel() > 0}

    def clip_gradients(self) -> torch.Tensor:
        """Scales gradients down where their norm, over all parameters and processes, is above config.max_grad_norm.

        Returns the norm that they had, on their device, without a wait for it; it is not finite where one of them is
        not.
        """
        gradients, most = self.gradients(), self.config.max_grad_norm
        norms = torch._foreach_norm(list(gradients.values())) if gradients else [torch.zeros_like(self.skipped).float()]
        if gradients and self.holders:
            norms = torch._foreach_mul(norms, [self.holders.get(name, 1) ** -0.5 for name in gradients])
        norm = torch.stack(norms).norm()
        if self.sum_across is not None:
            total = torch.stack(norms).double().square().sum().view(1)
            self.sum_across(total)
            norm = total[0].sqrt().float()
        if most and gradients:
            torch._foreach_mul_(list(gradients.values()), (most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """ "<parameter name>.<key>" -> tensor, on the CPU; a number is a tensor too. DTensors are as they are. Empty
        before the first step."""
        return {
            f"{name}.{key}": value if is_dtensor(value) else torch.as_tensor(value).detach().cpu().contiguous()
            for optimizer, name, parameter in named_in_groups(self.optimizers)
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], skipped: int = 0) -> None:
        """Copies what `state_dict` gives, and the number of skipped updates. Where the state is DTensors, `tensors` are
        such, or whole tensors, of which each process takes its part.

        A parameter that has no state in `tensors` never had a gradient, and starts afresh. Raises InputError for keys
        or shapes that are not this optimizer's.
        """
        layout = self.state_layout()
        check_state(self.config.name, tensors, {name: torch.as_tensor(like).shape for name, like in layout.items()})
        self.skipped.fill_(skipped)
        owners = {name: (optimizer, parameter) for optimizer, name, parameter in named_in_groups(self.optimizers)}
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, tensor in tensors.items():
            (optimizer, parameter), key, like = owners[name.rpartition(".")[0]], name.rpartition(".")[2], layout[name]
            is_tensor = isinstance(like, torch.Tensor)
            optimizer.state[parameter][key] = shard_like(tensor, like) if is_tensor else tensor.item()

    def state_bytes(self) -> int:
        """Bytes of the state that steps keep here for all parameters, whether it is there already or not."""
        likes = [torch.as_tensor(local_part(like)) for like in self.state_layout().values()]
        return sum(like.numel() * like.element_size() for like in likes)

    def state_layout(self) -> Dict[str, Any]:
        """ "<parameter name>.<key>" -> what is there after a step: a number, or a tensor (a DTensor) of its shape, type
        and device without memory of its own. A step of tiny parameters shows it."""
        tiny = [
            (name, Parameter(torch.zeros([2] * p.dim(), dtype=p.dtype, device=p.device)))
            for name, p in self.named_parameters
        ]
        for _, parameter in tiny:
            parameter.grad = torch.zeros_like(parameter)
        whole = dataclasses.replace(self.config, trust_ratio_slices=1)  # no state goes by slices
        optimizers = OPTIMIZERS[self.config.name](tiny, whole)
        for optimizer in optimizers:
            optimizer.step()
        own, layout = dict(self.named_parameters), {}
        for optimizer, name, parameter in named_in_groups(optimizers):
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value = as_part(value.new_empty(()).expand(local_part(own[name]).shape), own[name])
                layout[f"{name}.{key}"] = value
        return layout


def named_in_groups(optimizers: List[Optimizer]) -> Iterator[Tuple[Optimizer, str, Parameter]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                yield optimizer, name, parameter


def check_state(optimizer: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises InputError where `tensors` have other keys or shapes than the state of the optimizer of this name; all
    that belongs to a parameter may be missing."""
    begun, problems = {name.rpartition(".")[0] for name in tensors}, []
    for name, shape in shapes.items():
        if name not in tensors and name.rpartition(".")[0] in begun:
            problems.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} has the shape {list(tensors[name].shape)}, expected {list(shape)}")
    problems += [f"{name} is unexpected" for name in tensors if name not in shapes]
    if problems:
        few = ", ".join(problems[:3]) + (f", and {len(problems) - 3:,} more" if len(problems) > 3 else "")
        raise InputError(
            f'the optimizer\'s state is not one of optimizer.name "{optimizer}": {few}. Resume with the optimizer and '
            "the model that it was saved with"
        )


def make_optimizer(
    named_parameters: Iterable[Tuple[str, Parameter]],
    config: OptimizerConfig,
    compute_weights: Mapping[torch.Tensor, torch.Tensor] = {},
    sum_across: Optional[SumAcross] = None,
    holders: Mapping[str, int] = {},
) -> NamedOptimizer:
    """The optimizer that `config` names, for all parameters."""
    check_name(config)
    return NamedOptimizer(list(named_parameters), config, compute_weights, sum_across, holders)


def check_name(config: OptimizerConfig) -> None:
    """Raises InputError for a name that OPTIMIZERS lacks."""
    if config.name not in OPTIMIZERS:
        raise InputError(f'optimizer.name is "{config.name}", expected one of {", ".join(OPTIMIZERS)}')
