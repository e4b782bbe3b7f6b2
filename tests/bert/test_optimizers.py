"""Every optimizer, on random parameters and gradients: torch's own by hand, skipped updates, state that is resumed."""

import pytest
import torch
from torch.nn import Parameter

from bert.config import OptimizerConfig
from bert.optimizers import OPTIMIZERS, make_optimizer
from data.errors import InputError
from ops.lamb import Lamb, lamb_groups
from tests.cuda import on_cuda

NAMES = ["lamb", "adamw", "muon", "lion"]
CONFIG = OptimizerConfig(learning_rate=0.1, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.05)
SHAPES = {
    "bert.embeddings.word_embeddings.weight": (11, 6),
    "bert.encoder.layer.0.attention.self.query.weight": (6, 6),
    "bert.encoder.layer.0.attention.self.query.bias": (6,),
    "bert.encoder.layer.0.intermediate.dense.weight": (13, 6),
    "bert.encoder.layer.0.output.LayerNorm.weight": (6,),
    "cls.predictions.transform.dense.weight": (6, 6),
    "cls.predictions.bias": (1,),
}


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, with a Python number in its state."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                if p not in self.state:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "count": 0}
                state, (beta1, beta2) = self.state[p], group["betas"]
                state["count"] += 1
                update = torch.lerp(p.grad, state["exp_avg"], beta1).sign_() / state["count"] ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                state["exp_avg"].lerp_(p.grad, 1 - beta2)


def make_lion(named_parameters, config):
    names, params = zip(*named_parameters)
    group = {"params": list(params), "names": list(names)}
    return [Lion([group], config.learning_rate, config.betas, config.weight_decay)]


@pytest.fixture(autouse=True)
def lion(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", make_lion)


def config(name, max_grad_norm=0.0):
    return OptimizerConfig(**{**vars(CONFIG), "name": name, "max_grad_norm": max_grad_norm})


def draw(device="cpu"):
    return {name: Parameter(torch.randn(shape, device=device)) for name, shape in SHAPES.items()}


def copies(parameters):
    return {name: Parameter(p.detach().clone()) for name, p in parameters.items()}


def draw_gradients(*models, without=()):
    for name in SHAPES:
        gradient = torch.randn_like(models[0][name]) * 10.0 ** torch.randint(-3, 2, ()).item()
        for parameters in models:
            parameters[name].grad = None if name in without else gradient.clone()


def by_hand(name, parameters):
    """The optimizers, written out."""
    plain, decayed = {"betas": (0.8, 0.95), "eps": 1e-6}, {}
    decays = [n for n in SHAPES if len(SHAPES[n]) == 2]
    if name == "lamb":
        return [Lamb(lamb_groups(parameters.items(), 0.05), lr=0.1, **plain)]
    matrices = [n for n in decays if ".encoder." in n] if name == "muon" else []
    decayed = [parameters[n] for n in decays if n not in matrices]
    others = [parameters[n] for n in SHAPES if n not in decays]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=0.1, **plain)]
    if matrices:
        params = [parameters[n] for n in matrices]
        optimizers.append(torch.optim.Muon(params, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@pytest.mark.parametrize("limit", [0.0, 0.5, 20.0])  # below, and among, the norms of the gradients
@pytest.mark.parametrize("name", ["lamb", "adamw", "muon"])
def test_an_optimizer_is_torchs_own_by_hand_with_torchs_clipping(name, limit):
    parameters = draw()
    expected = copies(parameters)
    optimizer, optimizers = make_optimizer(parameters.items(), config(name, limit)), by_hand(name, expected)
    for rate in (0.1, 0.03, 0.2):
        draw_gradients(parameters, expected)
        if limit:
            torch.nn.utils.clip_grad_norm_(expected.values(), limit)
        optimizer.step(rate)
        for own in optimizers:
            for group in own.param_groups:
                group["lr"] = rate
            own.step()
    for key, parameter in parameters.items():
        rounds = name != "lamb" or limit
        torch.testing.assert_close(parameter, expected[key], rtol=1e-5 if rounds else 0, atol=1e-6)


def test_trust_ratio_slices_are_of_the_word_embedding_alone_and_leave_the_state_as_it_is():
    words = next(iter(SHAPES))
    sliced = OptimizerConfig(**{**vars(CONFIG), "name": "lamb", "trust_ratio_slices": 11})
    parameters = draw()
    expected, rows = copies(parameters), parameters[words].detach().clone().split(1)
    optimizer, whole = make_optimizer(parameters.items(), sliced), make_optimizer(expected.items(), config("lamb"))
    each = [Parameter(row) for row in rows]
    own = Lamb(each, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05)
    for _ in range(2):
        draw_gradients(parameters, expected)
        for p, gradient in zip(each, parameters[words].grad.split(1)):
            p.grad = gradient.clone()
        for step in (optimizer, whole):
            step.step(0.1)
        own.step()
    torch.testing.assert_close(parameters[words].detach(), torch.cat(each).detach())
    assert not torch.allclose(parameters[words], expected[words], rtol=1e-3)
    assert all(torch.equal(parameters[name], expected[name]) for name in SHAPES if name != words)
    states = optimizer.state_dict(), whole.state_dict()
    assert {key: tensor.shape for key, tensor in states[0].items()} == {
        key: tensor.shape for key, tensor in states[1].items()
    }
    whole.load_state_dict(states[0])  # another number of slices goes on from it
    assert optimizer.state_bytes() == whole.state_bytes()


def test_trust_ratio_slices_of_a_model_without_a_word_embedding_are_an_error():
    others = list(draw().items())[1:]
    sliced = OptimizerConfig(**{**vars(CONFIG), "name": "lamb", "trust_ratio_slices": 11})
    with pytest.raises(InputError, match="optimizer.trust_ratio_slices is 11, expected 1: .*word_embeddings.weight"):
        make_optimizer(others, sliced)
    make_optimizer(others, config("lamb"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value, limit", [("nan", 0.0), ("inf", 0.0), ("-inf", 0.5), ("nan", 0.5)])
def test_an_update_with_a_gradient_that_is_not_finite_changes_nothing_and_counts(name, value, limit):
    parameters = draw()
    compute_weights = {p: p.detach().bfloat16() for p in parameters.values()}
    optimizer = make_optimizer(parameters.items(), config(name, limit), compute_weights)
    draw_gradients(parameters)
    optimizer.step(0.1)
    assert optimizer.skipped.dtype == torch.int64 and optimizer.skipped == 0
    before = [t.detach().clone() for t in everything(parameters, optimizer)]
    for count in (1, 2):
        draw_gradients(parameters)
        parameters["bert.encoder.layer.0.intermediate.dense.weight"].grad[3, 2] = float(value)
        optimizer.step(0.1)
        after = everything(parameters, optimizer)
        assert len(before) == len(after) and all(map(torch.equal, before, after)) and optimizer.skipped == count
    draw_gradients(parameters)
    optimizer.step(0.1)
    assert not torch.equal(before[0], next(iter(parameters.values()))) and optimizer.skipped == 2


def everything(parameters, optimizer):
    return [*parameters.values(), *optimizer.state_dict().values(), *optimizer.compute_weights.values()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name, device):
    parameters, without = draw(device), ("cls.predictions.bias",)
    optimizer = make_optimizer(parameters.items(), config(name))
    assert optimizer.state_dict() == {}
    for _ in range(3):
        draw_gradients(parameters, without=without)
        optimizer.step(0.1)
    state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in state.values())
    others = copies(parameters)
    resumed = make_optimizer(others.items(), config(name))
    resumed.load_state_dict(state, 5)
    assert resumed.skipped == 5 and resumed.skipped.device == resumed.named_parameters[0][1].device
    for _ in range(3):
        draw_gradients(parameters, others)  # also for the one that had none
        optimizer.step(0.2)
        resumed.step(0.2)
    for key, parameter in parameters.items():
        assert torch.equal(parameter, others[key]), key
    both = optimizer.state_dict(), resumed.state_dict()
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_lambs_state_is_the_two_moments_of_old_checkpoints():
    parameters = draw()
    optimizer = make_optimizer(parameters.items(), config("lamb"))
    state = {f"{name}.{key}": torch.rand(shape) for name, shape in SHAPES.items() for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(state, 0)
    assert optimizer.state_dict().keys() == state.keys()
    state[f"{next(iter(SHAPES))}.exp_avg"].zero_()  # what was loaded is the optimizer's own
    assert optimizer.state_dict()[f"{next(iter(SHAPES))}.exp_avg"].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_keys_or_shapes_is_an_error_that_names_them(name):
    parameters, first = draw(), "bert.embeddings.word_embeddings.weight"
    optimizer = make_optimizer(parameters.items(), config(name))
    draw_gradients(parameters)
    optimizer.step(0.1)
    before = [t.detach().clone() for t in everything(parameters, optimizer)]
    for changes, message in [
        ({f"{first}.exp_avg": None}, f"{first}.exp_avg is missing"),
        ({f"{first}.more": torch.zeros(1)}, f"{first}.more is unexpected"),
        ({"another.exp_avg": torch.zeros(1)}, "another.exp_avg is unexpected"),
        ({f"{first}.exp_avg": torch.zeros(2, 3)}, f"{first}.exp_avg has the shape [2, 3], expected [11, 6]"),
    ]:
        state = {key: tensor for key, tensor in {**optimizer.state_dict(), **changes}.items() if tensor is not None}
        with pytest.raises(InputError) as error:
            optimizer.load_state_dict(state)
        assert f'the optimizer\'s state is not one of optimizer.name "{name}": {message}. Resume' in str(error.value)
        assert all(map(torch.equal, before, everything(parameters, optimizer)))


@pytest.mark.parametrize("saved, resumed, named", [("lamb", "adamw", "step"), ("adamw", "muon", "momentum_buffer")])
def test_the_state_of_another_optimizer_is_an_error(saved, resumed, named):
    parameters = draw()
    optimizer = make_optimizer(parameters.items(), config(saved))
    draw_gradients(parameters)
    optimizer.step(0.1)
    state = {key: value for key, value in optimizer.state_dict().items() if "intermediate" in key}
    with pytest.raises(InputError, match=f"intermediate.dense.weight.{named} is missing"):
        make_optimizer(draw().items(), config(resumed)).load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_compute_weights_are_the_rounded_weights(name):
    parameters = draw()
    some = list(parameters.values())[::2]
    compute_weights = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in some}
    optimizer = make_optimizer(parameters.items(), config(name), compute_weights)
    for _ in range(2):
        draw_gradients(parameters)
        optimizer.step(0.1)
        assert all(torch.equal(rounded, p.to(torch.bfloat16)) for p, rounded in compute_weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_state_are_those_that_a_step_makes(name):
    parameters = draw()
    optimizer = make_optimizer(parameters.items(), config(name))
    expected = optimizer.state_bytes()
    draw_gradients(parameters)
    optimizer.step(0.1)
    assert (
        expected
        == optimizer.state_bytes()
        == sum(t.numel() * t.element_size() for t in optimizer.state_dict().values())
    )
    values, matrices = sum(p.numel() for p in parameters.values()), 6 * 6 + 13 * 6
    each = {"lamb": 8 * values, "adamw": 8 * values, "muon": 8 * values - 4 * matrices, "lion": 4 * values}
    assert each[name] <= expected <= each[name] + 8 * len(SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_happens(name):
    parameters = draw()
    before = copies(parameters)
    optimizer = make_optimizer(parameters.items(), config(name))
    optimizer.step(0.1)
    assert all(torch.equal(p, before[key]) for key, p in parameters.items())
    assert optimizer.state_dict() == {} and optimizer.skipped == 0


def test_a_name_that_is_not_there_is_an_error_that_names_those_that_are():
    with pytest.raises(InputError, match='optimizer.name is "sgd", expected one of lamb, adamw, muon, lion'):
        make_optimizer(draw().items(), config("sgd"))


def test_muon_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(
        InputError, match='2.9 and newer do. Install requirements.txt, or set optimizer.name to "adamw"'
    ):
        make_optimizer(draw().items(), config("muon"))


def test_muon_takes_the_encoders_matrices_alone():
    optimizer = make_optimizer(draw().items(), config("muon"))
    taken = {
        type(own).__name__: {n for group in own.param_groups for n in group["names"]} for own in optimizer.optimizers
    }
    assert taken["Muon"] == {name for name in SHAPES if ".encoder." in name and len(SHAPES[name]) == 2}
    assert taken["AdamW"] == set(SHAPES) - taken["Muon"]
