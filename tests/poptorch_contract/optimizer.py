"""poptorch.optim: LAMB and AdamW as PopTorch's users see them, and the updates that PopART makes of them.

LAMB (arXiv 1904.00962) with phi(z) = min(z, max_weight_norm); without bias correction it is PopART's LambNoBias. AdamW
is PopART's Adam, or AdamNoBias, with WeightDecayMode::Decay. Those with bias correction count each weight's steps.
"""

import torch

from tests.poptorch_contract.facts import from_facts, types_of

__all__ = ["OPTIM", "Optimizer", "check_constants", "updated"]

_FLOAT16_MAX = 65500.0
_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@from_facts("optim")
class VariableAttributes:
    def __init__(self, variable_attributes, allowed_attributes):
        self._variable, self._allowed = set(variable_attributes), tuple(allowed_attributes)

    def isConstant(self, attr):
        return attr not in self._variable

    def markAsConstant(self, attr):
        self._check(attr)
        self._variable.discard(attr)

    def markAsVariable(self, attr):
        self._check(attr)
        self._variable.add(attr)

    def _check(self, attr):
        assert attr in self._allowed, f"unknown attribute {attr!r}; there are {', '.join(self._allowed)}"


@from_facts("optim")
class Optimizer:
    """The state is fetched from the device when it is asked for. One that was loaded is written to it when an executor
    attaches, by setOptimizer, or by the next step."""

    def _begin(self):
        self._ipu = {"ipu_state": None, "ipu_param": None}
        self._executor = None  # who has the state on its device: a weak reference
        self._is_stale = self._is_loaded = False

    def state_dict(self):
        executor = self._executor() if self._executor else None
        if executor is not None and self._is_stale:
            self.set_state_dict({**executor._read_state(), **torch.optim.Optimizer.state_dict(self)})
            self._is_loaded = False
        return self.get_state_dict()

    def load_state_dict(self, state):
        if not state or not ("ipu_state" in state and "ipu_param" in state):
            raise RuntimeError("only a state with ipu_state and ipu_param can be loaded")
        torch.optim.Optimizer.load_state_dict(self, state)
        self.set_state_dict(state)

    def get_state_dict(self):
        return {**self._ipu, **torch.optim.Optimizer.state_dict(self)}

    def set_state_dict(self, state):
        self._ipu = {key: state[key] for key in ("ipu_state", "ipu_param")}
        self._is_stale, self._is_loaded = False, True

    def has_state(self):
        return self._ipu["ipu_state"] is not None and self._ipu["ipu_param"] is not None

    def _values(self, name_of):
        """What the executor takes over, and nothing that is changed later: the groups' numbers, with their parameters'
        names."""
        groups = []
        for number, group in enumerate(self.param_groups):  # other keys are left alone
            values = {name: self.defaults[name] if group.get(name) is None else group[name] for name in self._group}
            if not isinstance(values["betas"], tuple) or len(values["betas"]) != 2:
                raise ValueError(f"group {number} of {self._place}: betas is a pair, not {values['betas']!r}")
            for parameter in group["params"]:
                if id(parameter) not in name_of:
                    raise ValueError(f"group {number} of {self._place} has a tensor that is no parameter of the module")
            groups.append(dict(values, names=[name_of[id(parameter)] for parameter in group["params"]]))
        return {
            "loss_scaling": float(self.loss_scaling),
            "groups": groups,
            "constants": {name for name in self._group + ("loss_scaling",) if self.variable_attrs.isConstant(name)},
        }

    def _attributes(self):
        """What PopTorch watches for attributes that come later: what it is, and their names."""
        yield "default group variable", set(self.defaults)
        for number, group in enumerate(self.param_groups):
            yield f"group {number} attribute", set(group) - {"params"}

    def _end(
        self, given, bias_correction, accum_type, first_order_momentum_accum_type, second_order_momentum_accum_type
    ):
        """What LAMB and AdamW do alike at the end of __init__; `given` has what is streamed to the device by name."""
        self.bias_correction = True if bias_correction is None else bias_correction
        self.loss_scaling = 1.0 if given["loss_scaling"] is None else given["loss_scaling"]
        self.accum_type = _type(accum_type)
        self.first_order_momentum_accum_type = _type(first_order_momentum_accum_type)
        self.second_order_momentum_accum_type = _type(second_order_momentum_accum_type)
        # What is given can change from step to step, until it is marked as constant; the rest is compiled in.
        self.variable_attrs = types_of()["VariableAttributes"](
            [name for name, value in given.items() if value is not None], list(self.defaults) + ["loss_scaling"]
        )


@from_facts("optim")
class LAMB(Optimizer, torch.optim.Optimizer):
    _place = "poptorch.optim.LAMB"
    _group = ("lr", "betas", "eps", "weight_decay", "max_weight_norm")

    def __init__(self, params, lr, betas, eps, weight_decay, bias_correction, loss_scaling, max_weight_norm, **types):
        given = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_weight_norm=max_weight_norm)
        defaults = dict(_DEFAULTS, max_weight_norm=_FLOAT16_MAX)
        defaults.update((name, value) for name, value in given.items() if value is not None)
        self._begin()
        torch.optim.Optimizer.__init__(self, params, defaults)
        self.max_weight_norm = defaults["max_weight_norm"]
        self._end(dict(given, loss_scaling=loss_scaling), bias_correction, **types)

    def step(self, closure):
        raise RuntimeError("poptorch.optim.LAMB: the executor makes the step, on the device")


@from_facts("optim")
class AdamW(Optimizer, torch.optim.AdamW):
    _place = "poptorch.optim.AdamW"
    _group = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, params, lr, betas, eps, weight_decay, loss_scaling, bias_correction, **others):
        types = {name: value for name, value in others.items() if name.endswith("accum_type")}
        unused = sorted(name for name in set(others) - set(types) if others[name] is not None)
        if unused:
            raise ValueError(
                f"AdamW's {', '.join(unused)}: the stand-in has no model of it; its first user gives it one"
            )
        given = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._begin()
        torch.optim.AdamW.__init__(self, params, **{name: v for name, v in given.items() if v is not None})
        self._end(dict(given, loss_scaling=loss_scaling), bias_correction, **types)


def _type(dtype):
    assert dtype in (None, torch.float16, torch.float32), (
        f"accumulation types are torch.float32 or torch.float16, not {dtype}"
    )
    return torch.float32 if dtype is None else dtype


def check_constants(before, after) -> None:
    """Raises where values of an optimizer that were compiled in have changed."""
    for name in sorted(before["constants"]):
        was, now = (
            [values["loss_scaling"]] if name == "loss_scaling" else [group[name] for group in values["groups"]]
            for values in (before, after)
        )
        if was != now:
            raise RuntimeError(f"setOptimizer: {name} is constant, and was {was} at compilation; now it is {now}")
    if [group["names"] for group in before["groups"]] != [group["names"] for group in after["groups"]]:
        raise RuntimeError("setOptimizer: the groups have other parameters than at compilation")


def updated(weight, gradient, first, second, step, group, slices=1):
    """One update of one parameter: its new weight, first and second moment, and step where one is kept, all computed in
    float32. `step` is the number of updates before; None is without bias correction. LAMB has a trust ratio for each
    of `slices` equal parts of the rows."""
    beta1, beta2 = group["betas"]
    weight, gradient = weight.float(), gradient.float()
    first = beta1 * first.float() + (1 - beta1) * gradient
    second = beta2 * second.float() + (1 - beta2) * gradient**2
    m, v, after = first, second, []
    if step is not None:
        after = [step + 1]
        m, v = first / (1 - beta1 ** after[0]), second / (1 - beta2 ** after[0])
    update = m / (v**0.5 + group["eps"]) + group["weight_decay"] * weight
    if "max_weight_norm" in group:
        for w, u in zip(weight.chunk(slices), update.chunk(slices)) if slices > 1 else [(weight, update)]:
            weight_norm, update_norm = float((w**2).sum() ** 0.5), float((u**2).sum() ** 0.5)
            if min(weight_norm, group["max_weight_norm"]) > 0 and update_norm > 0:
                u *= min(weight_norm, group["max_weight_norm"]) / update_norm
    return [weight - group["lr"] * update, first, second, *after]


OPTIM = {"VariableAttributes": VariableAttributes, "Optimizer": Optimizer, "LAMB": LAMB, "AdamW": AdamW}
