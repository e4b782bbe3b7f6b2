"""The stand-in for PopTorch: that it refuses what PopTorch refuses, and computes what a device would."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ops.lamb import lamb_plain
from tests.poptorch_contract import ROOT, executors, python_path, sdk

# B rows of a micro-batch, I input features, C classes.
I, C = 6, 4


@pytest.fixture
def poptorch(monkeypatch):
    monkeypatch.setenv("STAND_IN_IPUS", "8")
    return sdk(monkeypatch)


class Net(torch.nn.Module):
    """Two stages; `odd` is called in the second with its result, and gives what goes on."""

    def __init__(self, dropout=0.0, odd=lambda x: x, last_block="last", ipu=1, mark=True):
        super().__init__()
        self.first, self.last = torch.nn.Linear(I, 8), torch.nn.Linear(8, C)
        self.dropout, self.odd, self.last_block, self.ipu, self.mark = dropout, odd, last_block, ipu, mark

    def forward(self, x, labels):
        import poptorch

        with poptorch.Block("first", ipu_id=0):
            hidden = F.dropout(F.gelu(self.first(x)), self.dropout, self.training)
        with poptorch.Block(self.last_block, ipu_id=self.ipu):
            logits = self.odd(self.last(hidden)).float()
            loss = F.cross_entropy(logits, labels.long(), reduction="none").sum()
            return poptorch.identity_loss(loss, "none") if self.mark else loss, (logits.argmax(dim=-1) == labels).float().sum()


def make_options(poptorch, accumulation=4, iterations=1, replicas=1, mode="Sum"):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas).randomSeed(7)
    options.Training.gradientAccumulation(accumulation)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    options.outputMode(getattr(poptorch.OutputMode, mode))
    return options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.Stage("first").ipu(0), poptorch.Stage("last").ipu(1)))


def make_lamb(poptorch, model, **settings):
    decay = {"params": [model.first.weight, model.last.weight], "weight_decay": 0.1}
    other = {"params": [model.first.bias, model.last.bias], "weight_decay": 0.0, "max_weight_norm": 0.0}
    settings = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "bias_correction": False, "loss_scaling": 1.0, **settings}
    return poptorch.optim.LAMB([decay, other], **settings)


def make_batch(rows=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, I, generator=generator), torch.randint(C, (rows,), generator=generator, dtype=torch.int32)


def make_training(poptorch, options=None, settings=(), half=False, **changes):
    torch.manual_seed(1)
    model = Net(**changes)
    if half:
        model.half()
    optimizer = make_lamb(poptorch, model, **dict(settings))
    return model, optimizer, poptorch.trainingModel(model, options or make_options(poptorch), optimizer)


def weights_after(poptorch, batches, options, settings=(), **changes):
    model, _, executor = make_training(poptorch, options, settings, **changes)
    for batch in batches:
        executor(*batch)
    executor.copyWeightsToHost()
    executor.destroy()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(these, those, **tolerance):
    assert these.keys() == those.keys()
    for name in these:
        torch.testing.assert_close(these[name], those[name], msg=lambda text: "%s: %s" % (name, text), **tolerance)


# What there is.

def test_the_facts_are_those_of_the_sdks_description():
    path = ROOT.parent / "shared" / "poptorch" / "api.json"
    if not path.exists():
        pytest.skip("no description of the SDK beside the project")
    api, facts = json.loads(path.read_text()), json.loads((ROOT / "tests" / "poptorch_contract" / "facts.json").read_text())

    def parameters(arguments):
        types = [one.get("type", "").replace("'", "").replace("poptorch.", "").replace("options.", "") for one in arguments]
        return [one["name"] + (": " + kind if kind else "") + (" = " + one["default"] if "default" in one else "")
                for one, kind in zip(arguments, types)]

    assert facts["functions"] == {name: parameters(arguments) for name, arguments in api["functions"].items()}
    for section in ("classes", "options", "optim"):
        assert facts[section] == {name: {method: parameters(arguments) for method, arguments in entry["methods"].items()}
                                  for name, entry in api[section].items()}
    assert facts["executor"] == {name: parameters(arguments) for name, arguments in api["executor"]["methods"].items()
                                 if name not in api["executor"]["properties"]}
    described = {**api["classes"], **api["options"], "PoplarExecutor": api["executor"]}
    assert facts["properties"] == {name: entry["properties"] for name, entry in described.items() if entry.get("properties")}
    assert {name: {member: str(value) for member, value in members.items()} for name, members in facts["enums"].items()} == {
        name: {member: value.strip("'") for member, value in members.items()} for name, members in api["enums"].items()}
    assert facts["popart_enums"] == api["popart_enums"] and facts["popart_patterns"] == api["popart_patterns"]
    assert {key: kind for kind, keys in facts["session_options"].items() for key in keys} == api["session_options"]
    assert facts["aten_ops_handled"] == api["aten_ops_handled"]
    assert facts["aten_ops_whole"] == api["aten_ops_intercepted_before_decomposition"]
    assert set(facts["custom_ops"]) == {schema.split("(")[0] for schema in api["custom_op_schemas"]}


def test_the_sdk_imports_as_packages(poptorch):
    import popart
    import popdist
    import popdist.poptorch

    assert poptorch.__version__.startswith("3.") and poptorch.ipuHardwareVersion() == 2
    assert int(popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized) == 3
    assert not popdist.isPopdistEnvSet() and issubclass(popdist.poptorch.Options, poptorch.Options)
    assert poptorch.ipuHardwareIsAvailable(8) and not poptorch.ipuHardwareIsAvailable(9)


@pytest.mark.parametrize("ask", [
    lambda p: p.Optionz, lambda p: p.optim.Lamb, lambda p: p.Options().replicaFactor, lambda p: p.OutputMode.Mean,
    lambda p: p.Options().Training.learningRate, lambda p: p.TensorLocationSettings().useOffChip,
    lambda p: p.PipelinedExecution("a").stages, lambda p: make_training(p)[2].loss])
def test_a_name_that_is_not_poptorchs_is_refused(poptorch, ask):
    with pytest.raises(AttributeError):
        ask(poptorch)


@pytest.mark.parametrize("call", [
    lambda p, o: o.deviceIterations(), lambda p, o: o.deviceIterations("4"), lambda p, o: o.deviceIterations(device_iters=4),
    lambda p, o: o.deviceIterations(True), lambda p, o: o.randomSeed(1.0), lambda p, o: o.outputMode("Sum"),
    lambda p, o: o.Training.accumulationAndReplicationReductionType(p.OutputMode.Sum), lambda p, o: o.Precision.setPartialsType("half"),
    lambda p, o: o.TensorLocations.setOptimizerLocation(True), lambda p, o: o.setExecutionStrategy("pipelined"),
    lambda p, o: o.setAvailableMemoryProportion([0.1]), lambda p, o: p.Stage("a").ipu("0"),
    lambda p, o: o._Popart.setEngineOptions({"opt.useAutoloader": True}), lambda p, o: o._Popart.setPatterns({"TiedGather": 1}),
    lambda p, o: o._Popart.set("disableGradAccumulationTensorStreams", 1), lambda p, o: o._Popart.set("subgraphCopyingStrategy", True),
    lambda p, o: o._Popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", [0]),
    lambda p, o: p.optim.LAMB([torch.nn.Parameter(torch.ones(2))], lr=0.1, trust_ratio=False), lambda p, o: p.ipuHardwareVersion(1)])
def test_an_argument_of_the_wrong_name_or_type_is_refused(poptorch, call):
    with pytest.raises(TypeError):
        call(poptorch, poptorch.Options())


@pytest.mark.parametrize("call", [
    lambda p, o: o.deviceIterations(0), lambda p, o: o.setAvailableMemoryProportion({"0": 0.2}),
    lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1.5}), lambda p, o: o.outputMode(p.OutputMode.EveryN),
    lambda p, o: o._Popart.set("noSuchOption", True), lambda p, o: o._Popart.setPatterns({"TiedGathers": True}),
    lambda p, o: o._Popart.set("subgraphCopyingStrategy", 2), lambda p, o: o.Precision.setPartialsType(torch.float64),
    lambda p, o: p.PipelinedExecution(p.Stage("a"), p.Stage("b", "a"))])
def test_a_value_that_poptorch_refuses_is_refused(poptorch, call):
    with pytest.raises(ValueError):
        call(poptorch, poptorch.Options())


def test_options_chain_are_recorded_and_freeze_with_the_first_executor(poptorch):
    import popart

    options = make_options(poptorch, accumulation=5).autoRoundNumIPUs(True)
    options._Popart.set("accumulateOuterFragmentSettings.schedule", int(popart.AccumulateOuterFragmentSchedule.Serial))
    location = poptorch.TensorLocationSettings().useOnChipStorage(False).useReplicatedTensorSharding(True)
    options.TensorLocations.setOptimizerLocation(location)
    assert options.called["Training.gradientAccumulation"] == 5 and options.called["autoRoundNumIPUs"] is True
    assert options.called["_Popart.accumulateOuterFragmentSettings.schedule"] == 1
    assert location.called == {"useOnChipStorage": False, "useReplicatedTensorSharding": True}
    make_training(poptorch, options)
    for change in (lambda: options.deviceIterations(2), lambda: options.Training.gradientAccumulation(2),
                   lambda: options._Popart.set("enableOutlining", False), lambda: options._Popart.setEngineOptions({})):
        with pytest.raises(AttributeError, match="frozen"):
            change()
    with pytest.raises(AttributeError, match="cannot be set"):
        poptorch.Options().device_iterations = 3


# The graph.

def compile_net(poptorch, options=None, **changes):
    _, _, executor = make_training(poptorch, options, **changes)
    x, labels = make_batch()
    executor.compile(x.half() if changes.get("half") else x, labels)
    return executor


def test_each_operator_is_traced_in_its_block_with_its_type(poptorch):
    executor = compile_net(poptorch, half=True, dropout=0.1)
    assert executors()[-1] is executor
    names = [(event.name, event.ipu) for event in executor.trace]
    assert ("dropout", 0) in names and ("gelu", 0) in names and ("nll_loss_forward", 1) in names and ("poptorch.identity_loss", 1) in names
    assert not any(name in ("bernoulli_", "empty_like") for name, _ in names)
    product = [event for event in executor.trace if event.name == "addmm"][-1]
    assert (product.block, product.shape, product.dtype) == ("last", (8, C), torch.float16)


@pytest.mark.parametrize("odd, named", [
    (lambda x: torch.cummax(x, dim=-1).values, "cummax"), (lambda x: torch.fft.rfft(x).real, "rfft|fft"),
    (lambda x: x.double().float(), "float64"), (lambda x: x * x.sum().item(), "item"), (lambda x: x if x.sum() > 0 else -x, "bool"),
    (lambda x: x[x > 0].sum() + x, "depend on values"),
    (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], "scaled_dot_product_attention"),
    (lambda x: x + F.one_hot(x.argmax(-1)).float(), "num_classes"), (lambda x: x.half() @ x.t(), "several types"),
    (lambda x: Doubled.apply(x), "autograd.Function")])
def test_an_operator_that_poptorch_does_not_lower_is_refused(poptorch, odd, named):
    with pytest.raises(Exception, match=named):
        compile_net(poptorch, odd=odd)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_operators_taken_whole_are_not_decomposed(poptorch):
    executor = compile_net(poptorch, odd=lambda x: x + F.one_hot(x.argmax(-1), C).float())
    assert "one_hot" in [event.name for event in executor.trace]


def test_an_operator_outside_of_every_block_is_refused(poptorch):
    class Outside(Net):
        def forward(self, x, labels):
            loss, right = super().forward(x, labels)
            return loss, right / 2

    model = Outside()
    with pytest.raises(RuntimeError, match="outside of every block"):
        poptorch.trainingModel(model, make_options(poptorch), make_lamb(poptorch, model)).compile(*make_batch())


def nested(poptorch, name):
    def odd(x):
        with poptorch.Block(name, ipu_id=1):
            return x + 1
    return odd


def test_blocks_neither_nest_nor_leave_the_strategy(poptorch):
    with pytest.raises(RuntimeError, match="inside block"):
        compile_net(poptorch, odd=nested(poptorch, "last"))
    with pytest.raises(ValueError, match="in no stage"):
        compile_net(poptorch, last_block="other")
    with pytest.raises(RuntimeError, match="3 stages.*visit 2"):
        compile_net(poptorch, make_options(poptorch).setExecutionStrategy(poptorch.PipelinedExecution("first", "last", "never")))


def test_blocks_run_in_the_order_and_on_the_ipus_of_the_strategy(poptorch):
    def with_stages(*stages):
        return make_options(poptorch).setExecutionStrategy(poptorch.PipelinedExecution(*stages))

    with pytest.raises(RuntimeError, match="in their order"):
        compile_net(poptorch, with_stages("last", "first"))
    with pytest.raises(ValueError, match="says IPU 1, its stage IPU 2"):
        compile_net(poptorch, with_stages(poptorch.Stage("first").ipu(0), poptorch.Stage("last").ipu(2)))


def test_a_stage_is_on_one_ipu(poptorch):
    options = make_options(poptorch).setExecutionStrategy(poptorch.PipelinedExecution(poptorch.Stage("first", "last")))
    with pytest.raises(RuntimeError, match="is on IPU 1, its stage 0 on IPU 0"):
        compile_net(poptorch, options)


def test_annotations_are_recorded_and_checked(poptorch):
    modes = poptorch.MatMulSerializationMode

    def product(factor=2, mode=modes.OutputChannels, proportion=0.2, of=lambda x: x):
        def odd(x):
            with poptorch.Attribute(__outline={"layer": "last"}):
                y = of(poptorch.serializedMatMul(x, x.transpose(0, 1), mode, factor))
            return poptorch.recomputationCheckpoint(poptorch.set_available_memory(y, proportion))[:, :C]
        return odd

    executor = compile_net(poptorch, odd=product())
    events = {event.name: event.arguments for event in executor.trace if event.name.startswith("poptorch.")}
    assert events["poptorch.serializedMatMul"] == {"mode": modes.OutputChannels, "factor": 2, "keep_precision": False}
    assert events["poptorch.Attribute"] == {"__outline": {"layer": "last"}}
    assert events["poptorch.set_available_memory"] == {"available_memory_proportion": 0.2}
    for changes, error in (({"factor": 3}, ValueError), ({"mode": modes.ReducingDim, "factor": 3}, ValueError),
                           ({"proportion": 0.0}, ValueError), ({"of": torch.tanh}, RuntimeError), ({"mode": "output_channels"}, TypeError)):
        with pytest.raises(error):
            compile_net(poptorch, odd=product(**changes))
    with pytest.raises(RuntimeError, match="traces"):
        poptorch.recomputationCheckpoint(torch.ones(2))


def test_an_input_goes_to_one_ipu(poptorch):
    class Twice(Net):
        def forward(self, x, labels):
            self.odd = lambda y: y + x.sum()
            return super().forward(x, labels)

    model = Twice()
    with pytest.raises(RuntimeError, match="input 0 is taken by operators on IPUs 0 and 1"):
        poptorch.trainingModel(model, make_options(poptorch), make_lamb(poptorch, model)).compile(*make_batch())


def test_the_moments_of_a_serialized_weight_come_in_parts(poptorch):
    class Cut(Net):
        def forward(self, x, labels):
            self.odd = lambda y: y + poptorch.serializedMatMul(
                torch.ones(len(y), 8, device=y.device, dtype=y.dtype), self.last.weight.t(), poptorch.MatMulSerializationMode.OutputChannels, C)
            return super().forward(x, labels)

    model = Cut()
    optimizer = make_lamb(poptorch, model)
    executor = poptorch.trainingModel(model, make_options(poptorch), optimizer)
    executor.compile(*make_batch())
    names = [name for name in optimizer.state_dict()["ipu_state"] if name.startswith("Accl2___")]
    assert sum("Slice:0" in name for name in names) == C and "Accl2___model.last.weight" not in names


def test_the_loss_is_marked_once(poptorch):
    with pytest.raises(RuntimeError, match="0 times"):
        compile_net(poptorch, mark=False)
    with pytest.raises(RuntimeError, match="2 times"):
        compile_net(poptorch, odd=lambda x: x + poptorch.identity_loss(x.sum(), "none"))
    with pytest.raises(RuntimeError, match="scalar"):
        compile_net(poptorch, odd=lambda x: poptorch.identity_loss(x, "none"))


# What a step takes.

@pytest.mark.parametrize("change, error", [
    (lambda x, y: (x, y.long()), TypeError), (lambda x, y: (x.double(), y), TypeError), (lambda x, y: ({"x": x}, y), TypeError),
    (lambda x, y: (x[:31], y[:31]), RuntimeError), (lambda x, y: (x, y[:16]), RuntimeError)])
def test_inputs_that_an_ipu_does_not_take_are_refused(poptorch, change, error):
    _, _, executor = make_training(poptorch)
    with pytest.raises(error):
        executor.compile(*change(*make_batch()))


def test_shapes_are_fixed_at_compilation(poptorch):
    executor = compile_net(poptorch)
    with pytest.raises(RuntimeError, match="compiled for"):
        executor(*make_batch(rows=64))


def test_a_pipeline_has_to_be_filled(poptorch):
    with pytest.raises(RuntimeError, match="gradientAccumulation is 2; a pipeline of 2 stages needs at least 3"):
        compile_net(poptorch, make_options(poptorch, accumulation=2))
    with pytest.raises(RuntimeError, match="deviceIterations is 1; a pipeline of 2 stages needs at least 2"):
        poptorch.inferenceModel(Net(), make_options(poptorch, accumulation=1)).compile(*make_batch())
    with pytest.raises(RuntimeError, match="gradientAccumulation"):
        poptorch.inferenceModel(Net(), make_options(poptorch, accumulation=4))


def test_automatic_loss_scaling_needs_float16_accumulation_and_the_mean(poptorch):
    def options(reduction="Mean"):
        options = make_options(poptorch)
        options.Training.setAutomaticLossScaling(True).accumulationAndReplicationReductionType(poptorch.ReductionType[reduction])
        return options

    for reduction, accumulation in (("Sum", torch.float16), ("Mean", torch.float32)):
        with pytest.raises(RuntimeError, match="automatic loss scaling"):
            compile_net(poptorch, options(reduction), settings={"accum_type": accumulation})
    compile_net(poptorch, options(), settings={"accum_type": torch.float16})


def test_without_ipus_an_executor_compiles_into_the_cache_and_does_not_run(poptorch, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_IPUS", "0")
    executor = compile_net(poptorch, make_options(poptorch).useOfflineIpuTarget().enableExecutableCaching(str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not executor.isAttachedToDevice()
    with pytest.raises(AssertionError, match="only compiles"):
        executor(*make_batch())
    with pytest.raises(RuntimeError, match="2 IPUs are wanted"):
        compile_net(poptorch)


def test_executors_share_the_ipus_by_detaching(poptorch, monkeypatch):
    monkeypatch.setenv("STAND_IN_IPUS", "3")
    first = compile_net(poptorch)
    _, _, second = make_training(poptorch)
    with pytest.raises(RuntimeError, match="2 IPUs are wanted, 2 are attached"):
        second(*make_batch())
    assert not second.isCompiled()
    first.detachFromDevice()
    second(*make_batch())
    with pytest.raises(RuntimeError, match="2 IPUs are wanted"):
        first(*make_batch())


def test_ipus_are_a_power_of_two_or_rounded(poptorch):
    def options():
        return make_options(poptorch).setExecutionStrategy(poptorch.PipelinedExecution("first", "last"))

    with pytest.raises(RuntimeError, match="3 IPUs, no power of two"):
        compile_net(poptorch, options(), ipu=2)
    compile_net(poptorch, options().autoRoundNumIPUs(True), ipu=2)


# What a step computes.

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


def test_unknown_keys_of_a_group_are_named(poptorch):
    model = Net()
    optimizer = poptorch.optim.LAMB([{"params": list(model.parameters()), "trust_ratio": True}], lr=0.1)
    with pytest.raises(ValueError, match="trust_ratio"):
        poptorch.trainingModel(model, make_options(poptorch), optimizer)


def test_output_modes(poptorch):
    x, labels = make_batch(rows=16)

    def loss(mode):
        options = make_options(poptorch, accumulation=4, iterations=2, replicas=2, mode=mode)
        return make_training(poptorch, options, {"lr": 0.0})[2](x, labels)[0]

    every = loss("All")
    assert every.shape == (16,)
    torch.testing.assert_close(loss("Sum"), every.view(2, 2, 4).sum(dim=(0, 2)))
    assert torch.equal(loss("Final"), every.view(2, 2, 4)[1, :, 3])
    assert torch.equal(loss("Default"), loss("Final"))


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
    plain, scaled = [weights_after(poptorch, batches, make_options(poptorch), {"loss_scaling": scale}) for scale in (1.0, 1024.0)]
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
        logits = F.linear(F.gelu(F.linear(x, leaves["first.weight"], leaves["first.bias"])), leaves["last.weight"], leaves["last.bias"])
        loss = F.cross_entropy(logits, labels.long(), reduction="sum") / 4
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
            m, v = moments.setdefault(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            is_matrix = name.endswith("weight")
            lamb_plain([expected[name]], [gradient], [m], [v], 0.05, (0.9, 0.99), 1e-6, 0.1 if is_matrix else 0.0, is_matrix)
        executor(x, labels)
    executor.copyWeightsToHost()
    assert_same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)


def test_float16_weights_are_rounded_and_trained(poptorch):
    model, _, executor = make_training(poptorch, half=True)
    before, (x, labels) = model.first.weight.detach().clone(), make_batch()
    losses = [executor(x.half(), labels)[0].item() for _ in range(10)]
    executor.copyWeightsToHost()
    assert model.first.weight.dtype == torch.float16 and not torch.equal(model.first.weight, before) and losses[-1] < losses[0]


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


# The optimizer's state.

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
    names = {"Accl%d___model.%s.%s" % (i, layer, kind) for i in (1, 2) for layer in ("first", "last") for kind in ("weight", "bias")}
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


def test_a_state_loaded_after_compilation_waits_for_the_next_attachment(poptorch):
    _, optimizer, executor = make_training(poptorch)
    executor(*make_batch())
    zero = optimizer.state_dict()
    zero["ipu_state"] = {name: torch.zeros_like(tensor) for name, tensor in zero["ipu_state"].items()}
    optimizer.load_state_dict(zero)
    executor(*make_batch())
    kept = optimizer.state_dict()["ipu_state"]["Accl2___model.first.weight"].sum()
    optimizer.load_state_dict(zero)
    executor.detachFromDevice()
    executor.attachToDevice()
    executor(*make_batch())
    assert 0 < optimizer.state_dict()["ipu_state"]["Accl2___model.first.weight"].sum() < 0.6 * kept


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
    assert_same({name: weight.detach() for name, weight in model.named_parameters()},
                weights_after(poptorch, batches, make_options(poptorch)), rtol=0, atol=0)


# Several processes.

PROCESS = """
import sys, torch, popdist, popdist.poptorch, poptorch
from tests.test_poptorch_stand_in import make_batch, make_training, make_options
popdist.init()
options = popdist.poptorch.Options(ipus_per_replica=2)
assert (options.Distributed.processId, options.Distributed.numProcesses) == (popdist.getInstanceIndex(), 2)
for refused in (lambda: options.replicationFactor(2), lambda: options.useIpuId(1), options.Distributed.disable,
                lambda: options.Distributed.configureProcessId(0, 2), lambda: options.Distributed.setEnvVarNames("a", "b")):
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


def test_two_processes_are_one(poptorch, tmp_path):
    environment = dict(os.environ, PYTHONPATH=python_path(), STAND_IN_POPDIST_INSTANCES="2", STAND_IN_POPDIST_TOTAL_REPLICAS="2",
                       STAND_IN_POPDIST_FOLDER=str(tmp_path), OMP_NUM_THREADS="1")
    paths = [tmp_path / ("weights%d" % index) for index in range(2)]
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS, str(path)], cwd=str(ROOT), stderr=subprocess.PIPE,
                                  env=dict(environment, STAND_IN_POPDIST_INDEX=str(index))) for index, path in enumerate(paths)]
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
