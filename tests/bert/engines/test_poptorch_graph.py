"""The stand-in for PopTorch: that it compiles the graphs that PopTorch compiles, and refuses others."""

import pytest
import torch
import torch.nn.functional as F

from tests.poptorch_contract import executors
from tests.poptorch_contract.net import C, Net, make_batch, make_lamb, make_options, make_training, poptorch

pytestmark = pytest.mark.ipu


def compile_net(poptorch, options=None, **changes):
    _, _, executor = make_training(poptorch, options, **changes)
    x, labels = make_batch()
    executor.compile(x.half() if changes.get("half") else x, labels)
    return executor


def test_each_operator_is_traced_in_its_block_with_its_type(poptorch):
    executor = compile_net(poptorch, half=True, dropout=0.1)
    assert executors()[-1] is executor
    names = [(event.name, event.ipu) for event in executor.trace]
    assert (
        ("dropout", 0) in names
        and ("gelu", 0) in names
        and ("nll_loss_forward", 1) in names
        and ("poptorch.identity_loss", 1) in names
    )
    assert not any(name in ("bernoulli_", "empty_like") for name, _ in names)
    product = [event for event in executor.trace if event.name == "addmm"][-1]
    assert (product.block, product.shape, product.dtype) == ("last", (8, C), torch.float16)


@pytest.mark.parametrize(
    "odd, named",
    [
        (lambda x: torch.cummax(x, dim=-1).values, "cummax"),
        (lambda x: torch.fft.rfft(x).real, "rfft|fft"),
        (lambda x: x.double().float(), "float64"),
        (lambda x: x * x.sum().item(), "item"),
        (lambda x: x if x.sum() > 0 else -x, "bool"),
        (lambda x: x[x > 0].sum() + x, "depend on values"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], "scaled_dot_product_attention"),
        (lambda x: x + F.one_hot(x.argmax(-1)).float(), "num_classes"),
        (lambda x: x.half() @ x.t(), "several types"),
        (lambda x: Doubled.apply(x), "autograd.Function"),
    ],
)
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
        compile_net(
            poptorch, make_options(poptorch).setExecutionStrategy(poptorch.PipelinedExecution("first", "last", "never"))
        )


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

    def product(factor=2, mode=modes.OutputChannels, proportion: float = 0.2, of=lambda x: x):
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
    for changes, error in (
        ({"factor": 3}, ValueError),
        ({"mode": modes.ReducingDim, "factor": 3}, ValueError),
        ({"mode": modes.ReducingDim}, NotImplementedError),
        ({"proportion": "0.2"}, TypeError),
        ({"mode": "output_channels"}, TypeError),
    ):
        with pytest.raises(error):
            compile_net(poptorch, odd=product(**changes))
    for changes in ({"proportion": 0.0}, {"proportion": 1.5}, {"of": torch.tanh}):  # PopTorch takes these
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


def test_the_loss_is_marked_once(poptorch):
    with pytest.raises(RuntimeError, match="0 times"):
        compile_net(poptorch, mark=False)
    with pytest.raises(RuntimeError, match="2 times"):
        compile_net(poptorch, odd=lambda x: x + poptorch.identity_loss(x.sum(), "none"))
    with pytest.raises(RuntimeError, match="scalar"):
        compile_net(poptorch, odd=lambda x: poptorch.identity_loss(x, "none"))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda x, y: (x, y.long()), TypeError),
        (lambda x, y: (x.double(), y), TypeError),
        (lambda x, y: ({"x": x}, y), TypeError),
        (lambda x, y: (x[:31], y[:31]), RuntimeError),
        (lambda x, y: (x, y[:16]), RuntimeError),
    ],
)
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
        options.Training.setAutomaticLossScaling(True).accumulationAndReplicationReductionType(
            poptorch.ReductionType[reduction]
        )
        return options

    for reduction, accumulation in (("Sum", torch.float16), ("Mean", torch.float32)):
        with pytest.raises(RuntimeError, match="automatic loss scaling"):
            compile_net(poptorch, options(reduction), settings={"accum_type": accumulation})
    compile_net(poptorch, options(), settings={"accum_type": torch.float16})


def test_without_ipus_an_executor_compiles_into_the_cache_and_does_not_run(poptorch, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_IPUS", "0")
    executor = compile_net(
        poptorch, make_options(poptorch).useOfflineIpuTarget().enableExecutableCaching(str(tmp_path / "cache"))
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not executor.isAttachedToDevice()
    with pytest.raises(AssertionError, match="only compiles"):
        executor(*make_batch())
    with pytest.raises(RuntimeError, match="2 IPUs are wanted"):
        compile_net(poptorch)


def test_a_model_is_wrapped_once_until_its_executor_is_destroyed(poptorch):
    model, _, executor = make_training(poptorch)
    with pytest.raises(RuntimeError, match="wrapped in a trainingModel already"):
        poptorch.trainingModel(model, make_options(poptorch), make_lamb(poptorch, model))
    executor.destroy()  # which does nothing before it is compiled
    with pytest.raises(RuntimeError, match="wrapped in a trainingModel already"):
        poptorch.trainingModel(model, make_options(poptorch), make_lamb(poptorch, model))
    executor.compile(*make_batch())
    poptorch.inferenceModel(model, poptorch.Options().deviceIterations(2))
    executor.destroy()
    poptorch.trainingModel(model, make_options(poptorch), make_lamb(poptorch, model)).compile(*make_batch())


def test_an_interrupted_compilation_leaves_a_wrapper_of_no_use(poptorch):
    def interrupt(x):
        raise KeyboardInterrupt

    model, _, executor = make_training(poptorch, odd=interrupt)
    with pytest.raises(KeyboardInterrupt):
        executor.compile(*make_batch())
    model.odd = lambda x: x
    assert not executor.isCompiled()
    with pytest.raises(RuntimeError, match="interrupted"):
        executor.compile(*make_batch())


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
