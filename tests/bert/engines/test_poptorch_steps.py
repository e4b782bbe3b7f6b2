"""The stand-in for PopTorch: that a step computes what a device would, and the optimizer's state comes and goes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ops.lamb import lamb_plain
from tests.poptorch_contract import ROOT, python_path
from tests.poptorch_contract.net import (
    C,
    I,
    Net,
    assert_same,
    make_batch,
    make_lamb,
    make_options,
    make_training,
    poptorch,
    weights_after,
)

pytestmark = pytest.mark.ipu


def test_host_weights_are_stale_until_they_are_copied(poptorch):
    model, _, executor = make_training(poptorch)
    before = model.first.weight.detach().clone()
    executor(*make_batch())
    assert torch.equal(model.first.weight, before)
    executor.copyWeightsToHost()
    assert not torch.equal(model.first.weight, before)


def test_host_changes_reach_the_device_only_when_copied(poptorch):
    model, _, executor = make_training(poptorch, settings={"lr": 0.0})
    first = executor(*make_batch())[0]
    with torch.no_grad():
        model.last.weight.mul_(3)
    assert torch.equal(executor(*make_batch())[0], first)
    executor.copyWeightsToDevice()
    assert not torch.equal(executor(*make_batch())[0], first)


def test_changes_of_the_module_after_compilation_have_no_effect(poptorch):
    model, _, executor = make_training(poptorch, settings={"lr": 0.0})
    first = executor(*make_batch())[0]
    model.odd = lambda x: 5 * x
    assert torch.equal(executor(*make_batch())[0], first)


def test_a_learning_rate_has_to_be_set(poptorch):
    model, optimizer, executor = make_training(poptorch, settings={"lr": 0.0})
    executor(*make_batch())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = model.first.weight.detach().clone()
    executor(*make_batch())
    executor.copyWeightsToHost()
    assert torch.equal(model.first.weight, before)
    executor.setOptimizer(optimizer)
    executor(*make_batch())
    executor.copyWeightsToHost()
    assert not torch.equal(model.first.weight, before)


def test_what_is_constant_cannot_be_set(poptorch):
    model, optimizer, executor = make_training(poptorch)
    optimizer.variable_attrs.markAsConstant("loss_scaling")
    executor.setOptimizer(optimizer)
    executor.compile(*make_batch())
    optimizer.param_groups[0]["lr"] = 0.3
    executor.setOptimizer(optimizer)
    optimizer.loss_scaling = 8.0
    with pytest.raises(RuntimeError, match="loss_scaling is constant"):
        executor.setOptimizer(optimizer)
    with pytest.raises(AssertionError, match="momentum"):
        optimizer.variable_attrs.markAsConstant("momentum")


@pytest.mark.parametrize("relax", [False, True])
def test_attributes_of_an_optimizer_are_warned_of_where_they_come_later(poptorch, caplog, relax):
    model = Net()
    optimizer = poptorch.optim.LAMB([{"params": list(model.parameters()), "unknown": 1}], lr=0.1)
    options = make_options(poptorch)
    options.relaxOptimizerAttributesChecks(relax)
    executor = poptorch.trainingModel(model, options, optimizer)
    executor(*make_batch())
    optimizer.load_state_dict(optimizer.state_dict())  # torch gives it a default more
    executor.setOptimizer(optimizer)
    warnings = [(record.name, record.message) for record in caplog.records if record.levelname == "WARNING"]
    late = "Ignoring unexpected default group variable in LAMB optimizer: ['differentiable']"
    assert warnings == [("poptorch", late)] * (not relax)


def test_output_modes(poptorch):
    x, labels = make_batch(rows=16)

    def loss(mode, period=None):
        options = make_options(poptorch, accumulation=4, iterations=2, replicas=2)
        options.outputMode(getattr(poptorch.OutputMode, mode), period)
        return make_training(poptorch, options, {"lr": 0.0})[2](x, labels)[0]

    every = loss("All")
    assert every.shape == (16,)
    torch.testing.assert_close(loss("Sum"), every.view(2, 2, 4).sum(dim=(0, 2)))
    assert torch.equal(loss("Final"), every.view(2, 2, 4)[1, :, 3])
    assert torch.equal(loss("Default"), loss("Final"))
    assert torch.equal(loss("EveryN", 2), every.view(2, 2, 2, 2)[..., 1].flatten())


def test_an_inference_model_returns_all_outputs_in_the_order_of_its_inputs(poptorch):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(I, C)

        def forward(self, x):
            with poptorch.Block("all", ipu_id=0):
                return self.layer(x)

    model, x = Logits(), make_batch()[0]
    executor = poptorch.inferenceModel(model, poptorch.Options().deviceIterations(2).replicationFactor(2))
    torch.testing.assert_close(executor(x), model.layer(x).detach())
    assert not executor(x).requires_grad


def test_loss_scaling_does_not_change_the_update(poptorch):
    batches = [make_batch(seed=seed) for seed in range(2)]
    plain, scaled = [
        weights_after(poptorch, batches, make_options(poptorch), {"loss_scaling": scale}) for scale in (1.0, 1024.0)
    ]
    assert_same(plain, scaled, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation, replicas", [(4, 1), (8, 1), (4, 2), (4, 4)])
def test_accumulation_and_replicas_are_one_large_batch(poptorch, accumulation, replicas):
    class Whole(Net):
        def forward(self, x, labels):
            with poptorch.Block("first", ipu_id=0):
                loss = F.cross_entropy(self.last(F.gelu(self.first(x))), labels.long(), reduction="none").sum()
                return poptorch.identity_loss(loss / (accumulation * replicas), "none")

    torch.manual_seed(1)
    model = Whole()
    executor = poptorch.trainingModel(model, poptorch.Options(), make_lamb(poptorch, model))
    executor(*make_batch())
    executor.destroy()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    options = make_options(poptorch, accumulation=accumulation, replicas=replicas)
    assert_same(weights_after(poptorch, [make_batch()], options), expected, rtol=1e-4, atol=1e-5)


def test_the_sum_of_gradients_is_the_mean_times_their_number(poptorch):
    def first_moment(reduction):
        options = make_options(poptorch, replicas=2)
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType[reduction])
        _, optimizer, executor = make_training(poptorch, options)
        executor(*make_batch())
        return optimizer.state_dict()["ipu_state"]["Accl1___model.first.weight"]

    torch.testing.assert_close(first_moment("Sum"), 8 * first_moment("Mean"))


def test_gradients_are_added_up_in_their_own_type(poptorch):
    def first_moment(accum_type):
        _, optimizer, executor = make_training(poptorch, settings={"accum_type": accum_type})
        executor(*make_batch())
        return optimizer.state_dict()["ipu_state"]["Accl1___model.first.weight"]

    half, full = first_moment(torch.float16), first_moment(torch.float32)
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=1e-2, atol=1e-4)


def test_device_iterations_are_consecutive_steps(poptorch):
    (x1, y1), (x2, y2) = make_batch(seed=1), make_batch(seed=2)
    both = torch.cat([x1, x2]), torch.cat([y1, y2])
    at_once = weights_after(poptorch, [both], make_options(poptorch, iterations=2))
    assert_same(at_once, weights_after(poptorch, [(x1, y1), (x2, y2)], make_options(poptorch)), rtol=0, atol=0)


def test_the_update_is_lamb(poptorch):
    model, _, executor = make_training(poptorch)
    expected, moments = {name: weight.detach().clone() for name, weight in model.named_parameters()}, {}
    for seed in range(3):
        x, labels = make_batch(seed=seed)
        leaves = {name: weight.clone().requires_grad_() for name, weight in expected.items()}
        logits = F.linear(
            F.gelu(F.linear(x, leaves["first.weight"], leaves["first.bias"])),
            leaves["last.weight"],
            leaves["last.bias"],
        )
        loss = F.cross_entropy(logits, labels.long(), reduction="sum") / 4
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
            m, v = moments.setdefault(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            is_matrix = name.endswith("weight")
            group = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "trust_ratio": is_matrix}
            group["weight_decay"] = 0.1 if is_matrix else 0.0
            lamb_plain([expected[name]], [gradient], [m], [v], [None], [group], torch.zeros(()))
        executor(x, labels)
    executor.copyWeightsToHost()
    assert_same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)


class Cut(Net):
    """With a product of `last.weight` in two parts."""

    def forward(self, x, labels):
        import poptorch

        def odd(y):
            mode, ones = poptorch.MatMulSerializationMode.OutputChannels, torch.ones_like(y).repeat(1, 8 // C)
            return y + poptorch.serializedMatMul(ones, self.last.weight.t(), mode, 2)

        self.odd = odd
        return super().forward(x, labels)


@pytest.mark.parametrize("adds_up", [True, False])
def test_a_serialized_weight_is_updated_in_parts_whose_trust_ratios_a_pattern_makes_one(poptorch, adds_up):
    torch.manual_seed(1)
    model, options, batch = Cut(), make_options(poptorch), make_batch()
    options._Popart.setPatterns({"LambSerialisedWeight": adds_up})
    with torch.no_grad():
        model.last.weight[2:] *= 100
    before, optimizer = model.last.weight.detach().clone(), make_lamb(poptorch, model)
    executor = poptorch.trainingModel(model, options, optimizer)
    executor(*batch)
    executor.copyWeightsToHost()
    state = optimizer.state_dict()["ipu_state"]
    names = [f"Accl{i}___MatMul:MatMulRhsGradOp_Slice:0" for i in (1, 2)]
    assert all(name in state and name + "/1" in state for name in names) and len(state) == 6 + 4
    moments = [torch.cat([state[name], state[name + "/1"]]) for name in names]
    update = moments[0] / (moments[1].sqrt() + 1e-6) + 0.1 * before
    parts = [(before, update)] if adds_up else list(zip(before.chunk(2), update.chunk(2)))
    expected = torch.cat([w - 0.05 * w.norm() / u.norm() * u for w, u in parts])
    torch.testing.assert_close(model.last.weight.detach(), expected)


def test_without_accumulation_a_serialized_weight_is_updated_whole(poptorch):
    model = Cut()
    optimizer = make_lamb(poptorch, model)
    options = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    options._Popart.setPatterns({"LambSerialisedWeight": False})
    executor = poptorch.trainingModel(model, options, optimizer)
    executor(*make_batch())
    assert not any("Slice" in name for name in optimizer.state_dict()["ipu_state"])


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_update_is_adamw_and_counts_its_steps_where_it_corrects_the_bias(poptorch, bias_correction):
    model, expected = Net(), Net()
    expected.load_state_dict(model.state_dict())
    settings = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = poptorch.optim.AdamW(model.parameters(), bias_correction=bias_correction, **settings)
    executor = poptorch.trainingModel(model, make_options(poptorch), optimizer)
    torchs = torch.optim.AdamW(expected.parameters(), **settings)
    for step in range(1, 4):
        x, labels = make_batch(seed=step)
        torchs.zero_grad()
        logits = expected.last(F.gelu(expected.first(x)))
        (F.cross_entropy(logits, labels.long(), reduction="sum") / 4).backward()
        if not bias_correction:  # the corrected update is the same with these
            root = (1 - 0.99**step) ** 0.5
            rate = 0.05 * (1 - 0.9**step) / root
            torchs.param_groups[0].update(lr=rate, weight_decay=0.1 * 0.05 / rate, eps=1e-6 / root)
        torchs.step()
        executor(x, labels)
    executor.copyWeightsToHost()
    assert_same(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-5, atol=1e-6)
    state = optimizer.state_dict()["ipu_state"]
    steps = {name: tensor for name, tensor in state.items() if name.startswith("Step___")}
    assert len(steps) == (4 if bias_correction else 0) and len(state) == 8 + len(steps)
    assert all(tensor.shape == () and tensor.dtype == torch.float32 and tensor == 3 for tensor in steps.values())


def test_what_poptorchs_adamw_has_no_model_for_here_is_refused(poptorch):
    with pytest.raises(ValueError, match="amsgrad, max_grad_norm"):
        poptorch.optim.AdamW(Net().parameters(), amsgrad=True, max_grad_norm=1.0)


def test_float16_weights_are_rounded_and_trained(poptorch):
    model, _, executor = make_training(poptorch, half=True)
    before, (x, labels) = model.first.weight.detach().clone(), make_batch()
    losses = [executor(x.half(), labels)[0].item() for _ in range(10)]
    executor.copyWeightsToHost()
    assert (
        model.first.weight.dtype == torch.float16
        and not torch.equal(model.first.weight, before)
        and losses[-1] < losses[0]
    )


def test_dropout_follows_the_seed(poptorch):
    def losses(seed):
        options = make_options(poptorch, mode="All").randomSeed(seed)
        executor = make_training(poptorch, options, {"lr": 0.0}, dropout=0.5)[2]
        return torch.stack([executor(*make_batch())[0] for _ in range(2)])

    first = losses(3)
    assert torch.equal(first, losses(3)) and not torch.equal(first, losses(4)) and not torch.equal(first[0], first[1])


def test_the_hosts_random_numbers_are_its_own(poptorch):
    _, _, executor = make_training(poptorch, dropout=0.5)
    before = torch.get_rng_state()
    executor(*make_batch())
    assert torch.equal(torch.get_rng_state(), before)


HALF_MOMENT = {"accum_type": torch.float16, "first_order_momentum_accum_type": torch.float16}


def test_a_restored_run_continues_as_the_uninterrupted_one(poptorch):
    batches = [make_batch(seed=seed) for seed in range(4)]
    expected = weights_after(poptorch, batches, make_options(poptorch), HALF_MOMENT)
    model, optimizer, executor = make_training(poptorch, settings=HALF_MOMENT)
    assert optimizer.state_dict()["ipu_state"] is None and not optimizer.has_state()
    for batch in batches[:2]:
        executor(*batch)
    executor.copyWeightsToHost()
    state, weights = optimizer.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {
        f"Accl{i}___model.{layer}.{kind}" for i in (1, 2) for layer in ("first", "last") for kind in ("weight", "bias")
    }
    assert set(state["ipu_state"]) == names and state["ipu_param"]
    assert state["ipu_state"]["Accl1___model.last.bias"].dtype == torch.float16
    assert state["ipu_state"]["Accl2___model.last.bias"].dtype == torch.float32
    model, optimizer, executor = make_training(poptorch, settings=HALF_MOMENT)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for batch in batches[2:]:
        executor(*batch)
    executor.copyWeightsToHost()
    assert_same(dict(model.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spoil", [lambda t: t.float(), lambda t: t.t().contiguous().t(), lambda t: t[:1].contiguous()])
def test_a_state_of_another_type_shape_or_layout_is_refused(poptorch, spoil):
    _, optimizer, executor = make_training(poptorch, settings=HALF_MOMENT)
    executor(*make_batch())
    state = optimizer.state_dict()
    state["ipu_state"]["Accl1___model.first.weight"] = spoil(state["ipu_state"]["Accl1___model.first.weight"])
    _, optimizer, executor = make_training(poptorch, settings=HALF_MOMENT)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Accl1___model.first.weight has to be a contiguous torch.float16"):
        executor.compile(*make_batch())


def test_a_state_that_lacks_a_tensor_warns_and_one_of_torch_is_refused(poptorch):
    _, optimizer, executor = make_training(poptorch)
    executor(*make_batch())
    state = optimizer.state_dict()
    del state["ipu_state"]["Accl1___model.first.weight"]
    _, optimizer, executor = make_training(poptorch)
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="no Accl1___model.first.weight"):
        executor.compile(*make_batch())
    with pytest.raises(RuntimeError, match="ipu_state"):
        optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})


@pytest.mark.parametrize("by", ["setOptimizer", "the step", "attachToDevice"])
def test_a_state_loaded_after_compilation_is_written(poptorch, by):
    _, optimizer, executor = make_training(poptorch)
    executor(*make_batch())
    state = optimizer.state_dict()
    state["ipu_state"] = {name: torch.zeros_like(tensor) for name, tensor in state["ipu_state"].items()}
    executor(*make_batch(seed=1))
    optimizer.load_state_dict(state)
    if by == "setOptimizer":
        executor.setOptimizer(optimizer)
        assert not any(tensor.any() for tensor in executor._tensors().values())
    if by == "attachToDevice":
        executor.detachFromDevice()
        executor.attachToDevice()
    executor(*make_batch())
    m, v = (optimizer.state_dict()["ipu_state"][f"Accl{i}___model.first.weight"] for i in (1, 2))
    torch.testing.assert_close(v, 0.01 * (m / 0.1) ** 2)  # both of one gradient, not of three


def test_what_comes_back_with_synthetic_data_is_uninitialised(poptorch):
    model, optimizer, executor = make_training(poptorch, make_options(poptorch).enableSyntheticData(True))
    assert executor(*make_batch())[0].isnan()
    assert all(tensor.isnan().all() for tensor in optimizer.state_dict()["ipu_state"].values())
    executor.copyWeightsToHost()
    assert model.first.weight.isnan().all()


def test_detaching_keeps_weights_and_state(poptorch):
    batches = [make_batch(seed=seed) for seed in range(3)]
    model, optimizer, executor = make_training(poptorch)
    executor(*batches[0])
    optimizer.state_dict()  # is older than what is detached
    executor(*batches[1])
    executor.detachFromDevice()
    executor.attachToDevice()
    executor(*batches[2])
    executor.copyWeightsToHost()
    assert_same(
        {name: weight.detach() for name, weight in model.named_parameters()},
        weights_after(poptorch, batches, make_options(poptorch)),
        rtol=0,
        atol=0,
    )


PROCESS = """
import sys, torch, popdist, popdist.poptorch, poptorch
from tests.poptorch_contract.net import make_batch, make_training, make_options
popdist.init()
options = popdist.poptorch.Options(ipus_per_replica=2)
assert (options.Distributed.processId, options.Distributed.numProcesses) == (popdist.getInstanceIndex(), 2)
for refused in (lambda: options.replicationFactor(2), lambda: options.useIpuId(1), options.Distributed.disable,
                lambda: options.Distributed.configureProcessId(0, 2), lambda: options.Distributed.setEnvVarNames("a",
                "b")):
    try:
        refused()
    except RuntimeError:
        continue
    raise SystemExit("not refused")
options.deviceIterations(1).randomSeed(7)
options.Training.gradientAccumulation(4).accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
options.outputMode(poptorch.OutputMode.Sum)
model, _, executor = make_training(poptorch, options)
for seed in range(2):
    x, labels = make_batch(seed=seed)
    first, last = 16 * popdist.getInstanceIndex(), 16 * popdist.getInstanceIndex() + 16
    loss = executor(x[first:last], labels[first:last])[0]
executor.copyWeightsToHost()
torch.save(model.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_are_one(poptorch, tmp_path):
    environment = dict(
        os.environ,
        PYTHONPATH=python_path(),
        STAND_IN_POPDIST_INSTANCES="2",
        STAND_IN_POPDIST_TOTAL_REPLICAS="2",
        STAND_IN_POPDIST_FOLDER=str(tmp_path),
        OMP_NUM_THREADS="1",
    )
    paths = [tmp_path / (f"weights{index}") for index in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(path)],
            cwd=str(ROOT),
            stderr=subprocess.PIPE,
            env=dict(environment, STAND_IN_POPDIST_INDEX=str(index)),
        )
        for index, path in enumerate(paths)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    first, second = [torch.load(str(path)) for path in paths]
    assert_same(dict(first), dict(second), rtol=0, atol=0)
    batches = [make_batch(seed=seed) for seed in range(2)]
    assert_same(dict(first), weights_after(poptorch, batches, make_options(poptorch, replicas=2)), rtol=1e-5, atol=1e-6)


def test_popdist_needs_poprun(poptorch):
    import popdist.poptorch

    with pytest.raises(RuntimeError, match="poprun"):
        popdist.poptorch.Options(ipus_per_replica=2)
