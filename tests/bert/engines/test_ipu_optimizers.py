"""The IPU engine's optimizers on the stand-in for PopTorch, beside the CPU engine's: steps, and state that moves."""

import numpy as np
import pytest
import torch

from bert.config import Config, IpuConfig, ModelConfig, OptimizerConfig, TrainingConfig
from bert.engines import make_engine
from data.errors import InputError
from data.rows import unpacked_batch
from tests.make_samples import random_samples
from tests.poptorch_contract import sdk

ROWS = 24


@pytest.fixture
def poptorch(monkeypatch):
    return sdk(monkeypatch)


def engine_on(device, tmp_path, factor=1, half=False, **optimizer):
    config = Config(
        model=ModelConfig(
            vocab_size=102,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        # PopART takes 1 - beta ** step in float32: of 0.999, it would be right to five digits only.
        optimizer=OptimizerConfig(
            **{"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.1, **optimizer}
        ),
        training=TrainingConfig(global_batch_size=ROWS, precision="auto" if half else "float32"),
        ipu=IpuConfig(
            layers_per_ipu=[0, 2],
            replication_factor=2,
            micro_batch_size=2,
            gradient_accumulation_steps=6,
            embedding_serialization_factor=factor,
            executable_cache_dir=str(tmp_path / "exe"),
        ),
    )
    config.data.sequence_length, config.data.mask_tokens = 16, 4
    return make_engine(config, device)


def batches(count):
    rng = np.random.default_rng(1)  # always the same: where the terms of a gradient cancel, rounding is large
    return [unpacked_batch(random_samples(rng, ROWS, 16, 4, 102)) for _ in range(count)]


def train(engine, these, first=1):
    for step, batch in enumerate(these, first):
        engine.step(batch, 0.01, step)


def move(engine, other):
    """Has `other` go on from where `engine` is, as a checkpoint does."""
    other.load_weights({name: tensor.clone() for name, tensor in engine.weights().items()})
    other.load_optimizer_state({name: tensor.clone() for name, tensor in engine.optimizer_state().items()}, 0)
    other.steps_done = engine.steps_done
    return other


def assert_same(engine, other, tolerance=1e-5):
    """The gradient of key biases is rounding, which AdamW makes as large as any."""
    for these, those in ((engine.weights(), other.weights()), (engine.optimizer_state(), other.optimizer_state())):
        assert these.keys() == those.keys()
        for name in these:
            if "attention.self.key.bias" not in name:
                assert these[name].shape == those[name].shape and these[name].dtype == those[name].dtype, name
                assert (these[name] - those[name]).norm() <= tolerance * those[name].norm(), name


@pytest.mark.parametrize("factor", [1, 3])
def test_adamw_on_ipus_is_adamw_on_the_cpu(tmp_path, poptorch, factor):
    ipu, cpu, these = engine_on("ipu", tmp_path, factor), engine_on("cpu", tmp_path), batches(3)
    train(ipu, these)
    train(cpu, these)
    assert_same(ipu, cpu)
    steps = {name: tensor for name, tensor in ipu.optimizer_state().items() if name.endswith(".step")}
    assert len(steps) == len(ipu.weights()) and all(tensor.item() == 3 for tensor in steps.values())


@pytest.mark.parametrize("first, second", [("cpu", "ipu"), ("ipu", "cpu"), ("ipu", "ipu")])
def test_adamw_goes_on_on_another_device(tmp_path, poptorch, first, second):
    whole, these = engine_on("cpu", tmp_path), batches(4)
    train(whole, these)
    begun = engine_on(first, tmp_path, factor=3)
    train(begun, these[:2])
    resumed = move(begun, engine_on(second, tmp_path, factor=3))
    train(resumed, these[2:], first=3)
    assert_same(resumed, whole)


def test_in_float16_adamw_resumes_bit_for_bit(tmp_path, poptorch):
    whole, begun, these = engine_on("ipu", tmp_path, half=True), engine_on("ipu", tmp_path, half=True), batches(4)
    train(whole, these)
    train(begun, these[:2])
    resumed = move(begun, engine_on("ipu", tmp_path, half=True))
    train(resumed, these[2:], first=3)
    assert_same(resumed, whole, tolerance=0.0)
    assert torch.equal(whole.optimizer_state()["bert.pooler.dense.bias.step"], torch.tensor(4.0))


def test_poptorchs_adamw_has_the_recipes_groups(tmp_path, poptorch):
    engine = engine_on("ipu", tmp_path, half=True)
    adamw, names = engine.optimizer, {id(parameter): name for name, parameter in engine.model.named_parameters()}
    assert isinstance(adamw, poptorch.optim.AdamW) and adamw.bias_correction and adamw.loss_scaling == 16384.0
    types = adamw.accum_type, adamw.first_order_momentum_accum_type, adamw.second_order_momentum_accum_type
    assert types == (torch.float16, torch.float16, torch.float32)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(names)
    for group in adamw.param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name
    assert adamw.variable_attrs.isConstant("weight_decay") and not adamw.variable_attrs.isConstant("lr")


def test_an_optimizer_that_poptorch_has_not_is_an_error_that_names_those_it_has(tmp_path, poptorch):
    with pytest.raises(InputError, match='optimizer.name is "muon", and IPUs have lamb, adamw.*--device cuda or'):
        engine_on("ipu", tmp_path, name="muon")


@pytest.mark.parametrize(
    "saved, loaded, message", [("lamb", "adamw", "step is missing"), ("adamw", "lamb", "unexpected")]
)
def test_the_state_of_another_optimizer_is_an_error(tmp_path, poptorch, saved, loaded, message):
    begun = engine_on("cpu", tmp_path, name=saved)
    train(begun, batches(1))
    with pytest.raises(InputError, match=f'not one of optimizer.name "{loaded}": .*{message}'):
        move(begun, engine_on("ipu", tmp_path, name=loaded))
