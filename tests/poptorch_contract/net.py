"""A small model of two stages for the tests of the stand-in, and what trains it."""

import pytest
import torch
import torch.nn.functional as F

from tests.poptorch_contract import sdk

# B rows of a micro-batch, I input features, C classes.
I, C = 6, 4  # noqa: E741


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
            return poptorch.identity_loss(loss, "none") if self.mark else loss, (
                logits.argmax(dim=-1) == labels
            ).float().sum()


def make_options(poptorch, accumulation=4, iterations=1, replicas=1, mode="Sum"):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas).randomSeed(7)
    options.Training.gradientAccumulation(accumulation)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    options.outputMode(getattr(poptorch.OutputMode, mode))
    return options.setExecutionStrategy(
        poptorch.PipelinedExecution(poptorch.Stage("first").ipu(0), poptorch.Stage("last").ipu(1))
    )


def make_lamb(poptorch, model, **settings):
    decay = {"params": [model.first.weight, model.last.weight], "weight_decay": 0.1}
    other = {"params": [model.first.bias, model.last.bias], "weight_decay": 0.0, "max_weight_norm": 0.0}
    settings = {
        "lr": 0.05,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "bias_correction": False,
        "loss_scaling": 1.0,
        **settings,
    }
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
        torch.testing.assert_close(these[name], those[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
