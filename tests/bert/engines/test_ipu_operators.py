"""The recipe's graphs as PopTorch meets them: in float16 and int32, of static shapes, made of operators that it lowers,
block by block."""

import collections
import json

import numpy as np
import pytest
import torch
from torch.func import functional_call

from bert.command_line import parse_command_line
from bert.engines.ipu import IpuModel
from bert.geometry import samples_per_row
from bert.model.stages import make_stages, placement
from bert.tasks import make_model, make_task
from ops.ipu import MATMULS
from tests.poptorch_contract import sdk
from tests.poptorch_contract.operators import check

pytestmark = pytest.mark.ipu

VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "alias", "detach")


def trace(poptorch, name, training=True, options=()):
    config = parse_command_line(["--config", name, "--device", "ipu", *options])
    ipu, task = config.ipu, make_task(config)
    stages = make_stages(ipu.layers_per_ipu, ipu.matmul_proportion)
    with torch.device("meta"):
        graph = make_model(config, task).half()
    model = IpuModel(config, task, graph, stages, poptorch).train(training)
    shape = task.row_shape(config.data, samples_per_row(config.data, static=True))
    layout = shape.layout(ipu.micro_batch_size)
    inputs = [torch.from_numpy(np.zeros(*layout[name])).to("meta") for name in model.inputs]
    assert {tensor.dtype for tensor in inputs} == {torch.int32, torch.float32}
    strategy = poptorch.PipelinedExecution(*(poptorch.Stage(*stage.blocks).ipu(stage.ipu) for stage in stages))
    traced, types = check(
        lambda state, tensors: functional_call(model, state, tuple(tensors)),
        dict(model.named_parameters()),
        {},
        inputs,
        strategy,
        training,
    )
    return config, stages, traced, types


@pytest.mark.parametrize(
    "name", ["pod16_phase1.json", "pod16_phase2.json", "pod4_phase2_packed.json", "large_pod16_phase1.json"]
)
def test_poptorch_lowers_every_operator_of_the_recipes_graphs(monkeypatch, name):
    config, stages, traced, types = trace(sdk(monkeypatch), name)
    layers, rows, length = config.model.num_hidden_layers, config.ipu.micro_batch_size, config.data.sequence_length
    assert types == [torch.float32] * 5
    assert {(event.block, event.ipu) for event in traced.events} == set(placement(stages).items())
    for event in traced.events:
        assert event.dtype in (None, torch.float16, torch.float32, torch.int32, torch.int64, torch.bool), event
        if event.name in ("mm", "bmm", "addmm", "_softmax", "native_layer_norm", "gelu", "dropout", "embedding"):
            assert event.dtype == torch.float16, event
        if event.dtype == torch.int64:  # PopTorch makes them int32; PyTorch asks for them by name
            assert event.name in ("argmax", "_to_copy", "one_hot", "view", "_unsafe_view", "detach", "alias"), event
    counts = collections.Counter(event.name for event in traced.events)
    assert counts["poptorch.recomputationCheckpoint"] == layers and counts["poptorch.identity_loss"] == 1
    assert counts["dropout"] == 1 + 3 * layers and counts["native_layer_norm"] == 2 + 2 * layers
    outlined = [event.block for event in traced.events if event.name == "poptorch.Attribute"]
    assert outlined == ["embeddings"]  # its LayerNorm is kept apart
    factors = [event.arguments["factor"] for event in traced.events if event.name == "poptorch.serializedMatMul"]
    assert factors == (
        [config.ipu.embedding_serialization_factor] if config.ipu.embedding_serialization_factor > 1 else []
    )
    scores = [event for event in traced.events if event.name == "_softmax"]
    assert [event.shape for event in scores] == [(rows, config.model.num_attention_heads, length, length)] * layers


@pytest.mark.parametrize("name", ["classification.json", "ner.json", "squad.json", "swag.json"])
def test_poptorch_lowers_the_heads_of_fine_tuning(monkeypatch, name):
    options = ["--optimizer.max_grad_norm", "0", "--task.labels", '["O", "B-PER", "I-PER"]']
    for training in (True, False):
        _, _, traced, types = trace(sdk(monkeypatch), name, training, options)
        assert types == [torch.float32] * (3 if training else 4)  # to evaluate, the outputs too
        heads = collections.Counter(event.name for event in traced.events if event.block == "heads")
        assert heads["addmm"] and heads["poptorch.identity_loss"] == training
        dtypes = {event.dtype for event in traced.events if event.name in ("mm", "bmm", "addmm", "tanh", "dropout")}
        assert dtypes <= {torch.float16, torch.float32} and torch.float16 in dtypes


def test_evaluation_drops_nothing_and_marks_no_loss(monkeypatch):
    _, _, traced, _ = trace(sdk(monkeypatch), "pod16_phase1.json", training=False)
    names = {event.name for event in traced.events}
    assert "mm" in names and not names & {"dropout", "poptorch.identity_loss"}


def test_memory_proportions_are_those_of_products(monkeypatch):
    """PopTorch takes any number, and ignores it after another operation."""
    shares = {name: 0.1 + 0.01 * i for i, name in enumerate(MATMULS)}
    options = ["--ipu.operation_proportions", json.dumps(shares)]
    _, _, traced, _ = trace(sdk(monkeypatch), "pod16_phase2.json", options=options)
    met, last = set(), None
    for event in traced.events:
        if event.name == "poptorch.set_available_memory":
            assert last in ("mm", "bmm", "addmm", "baddbmm"), (event, last)
            met.add(event.arguments["available_memory_proportion"])
        elif event.name not in VIEWS:
            last = event.name
    assert met == set(shares.values())
