"""The stand-in for PopTorch: that it has the SDK's names, arguments and values, and no others."""

import json

import pytest
import torch

from tests.poptorch_contract import ROOT
from tests.poptorch_contract.net import make_options, make_training, poptorch

pytestmark = pytest.mark.ipu


def test_the_facts_are_those_of_the_sdks_description():
    path = ROOT.parent / "shared" / "poptorch" / "api.json"
    if not path.exists():
        pytest.skip("no description of the SDK beside the project")
    api, facts = (
        json.loads(path.read_text()),
        json.loads((ROOT / "tests" / "poptorch_contract" / "facts.json").read_text()),
    )

    def parameters(arguments):
        types = [
            one.get("type", "").replace("'", "").replace("poptorch.", "").replace("options.", "") for one in arguments
        ]
        return [
            one["name"] + (": " + kind if kind else "") + (" = " + one["default"] if "default" in one else "")
            for one, kind in zip(arguments, types)
        ]

    assert facts["functions"] == {name: parameters(arguments) for name, arguments in api["functions"].items()}
    for section in ("classes", "options", "optim"):
        assert facts[section] == {
            name: {method: parameters(arguments) for method, arguments in entry["methods"].items()}
            for name, entry in api[section].items()
        }
    assert facts["executor"] == {
        name: parameters(arguments)
        for name, arguments in api["executor"]["methods"].items()
        if name not in api["executor"]["properties"]
    }
    described = {**api["classes"], **api["options"], "PoplarExecutor": api["executor"]}
    assert facts["properties"] == {
        name: entry["properties"] for name, entry in described.items() if entry.get("properties")
    }
    assert {
        name: {member: str(value) for member, value in members.items()} for name, members in facts["enums"].items()
    } == {
        name: {member: value.strip("'") for member, value in members.items()} for name, members in api["enums"].items()
    }
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


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: p.Optionz,
        lambda p: p.optim.Lamb,
        lambda p: p.Options().replicaFactor,
        lambda p: p.OutputMode.Mean,
        lambda p: p.Options().Training.learningRate,
        lambda p: p.TensorLocationSettings().useOffChip,
        lambda p: p.PipelinedExecution("a").stages,
        lambda p: make_training(p)[2].loss,
    ],
)
def test_a_name_that_is_not_poptorchs_is_refused(poptorch, ask):
    with pytest.raises(AttributeError):
        ask(poptorch)


@pytest.mark.parametrize(
    "ask",
    [lambda p: p.DataLoader, lambda p: p.for_loop, lambda p: p.optim.SGD, lambda p: make_training(p)[2].getLatency],
)
def test_a_name_that_nothing_here_uses_asks_for_a_model(poptorch, ask):
    with pytest.raises(AttributeError, match="is PopTorch's, but nothing here has used it yet"):
        ask(poptorch)


def test_an_optimizer_of_torch_is_refused(poptorch):
    model, _, executor = make_training(poptorch)
    with pytest.raises(TypeError, match="poptorch.optim.LAMB"):
        executor.setOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "call",
    [
        lambda p, o: o.deviceIterations(),
        lambda p, o: o.deviceIterations("4"),
        lambda p, o: o.deviceIterations(device_iters=4),
        lambda p, o: o.deviceIterations(True),
        lambda p, o: o.randomSeed(1.0),
        lambda p, o: o.outputMode("Sum"),
        lambda p, o: o.Training.accumulationAndReplicationReductionType(p.OutputMode.Sum),
        lambda p, o: o.Precision.setPartialsType("half"),
        lambda p, o: o.TensorLocations.setOptimizerLocation(True),
        lambda p, o: o.setExecutionStrategy("pipelined"),
        lambda p, o: o.setAvailableMemoryProportion([0.1]),
        lambda p, o: p.Stage("a").ipu("0"),
        lambda p, o: o._Popart.setEngineOptions({"opt.useAutoloader": True}),
        lambda p, o: o._Popart.setPatterns({"TiedGather": 1}),
        lambda p, o: o._Popart.set("disableGradAccumulationTensorStreams", 1),
        lambda p, o: o._Popart.set("subgraphCopyingStrategy", True),
        lambda p, o: o._Popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", [0]),
        lambda p, o: p.optim.LAMB([torch.nn.Parameter(torch.ones(2))], lr=0.1, trust_ratio=False),
        lambda p, o: p.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, max_weight_norm=0.0),
        lambda p, o: p.ipuHardwareVersion(1),
    ],
)
def test_an_argument_of_the_wrong_name_or_type_is_refused(poptorch, call):
    with pytest.raises(TypeError):
        call(poptorch, poptorch.Options())


@pytest.mark.parametrize(
    "call",
    [
        lambda p, o: o.deviceIterations(0),
        lambda p, o: o.setAvailableMemoryProportion({"0": 0.2}),
        lambda p, o: o.outputMode(p.OutputMode.EveryN),
        lambda p, o: o._Popart.set("noSuchOption", True),
        lambda p, o: o._Popart.setPatterns({"TiedGathers": True}),
        lambda p, o: o._Popart.set("subgraphCopyingStrategy", 2),
        lambda p, o: o.Precision.setPartialsType(torch.float64),
        lambda p, o: p.PipelinedExecution(p.Stage("a"), p.Stage("b", "a")),
    ],
)
def test_a_value_that_poptorch_refuses_is_refused(poptorch, call):
    with pytest.raises(ValueError):
        call(poptorch, poptorch.Options())


def test_any_memory_proportion_is_taken(poptorch):
    for share in (0.0, 0.2, 1.5):
        called = poptorch.Options().setAvailableMemoryProportion({"IPU0": share}).called
        assert called["setAvailableMemoryProportion"] == {"IPU0": share}


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
    for change in (
        lambda: options.deviceIterations(2),
        lambda: options.Training.gradientAccumulation(2),
        lambda: options._Popart.set("enableOutlining", False),
        lambda: options._Popart.setEngineOptions({}),
    ):
        with pytest.raises(AttributeError, match="frozen"):
            change()
    with pytest.raises(AttributeError, match="cannot be set"):
        poptorch.Options().device_iterations = 3
