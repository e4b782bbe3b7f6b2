"""Steps of the engine for CPUs and GPUs: any micro-batch, dropout, rounded weights, skipped and interrupted updates."""

import signal

import numpy as np
import pytest
import torch

from bert.command_line import parse_command_line
from bert.config import Config, ModelConfig
from bert.engines import make_engine
from bert.signals import interruptible, protected
from data.rows import unpacked_batch
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, make_shards
from tests.make_samples import random_samples


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_one_global_batch_gives_the_same_gradients_for_any_micro_batch_clipped_or_not(tmp_path, shards, limit):
    samples = random_samples(np.random.default_rng(), 16, LENGTH, MASKS, VOCAB)
    samples.nsp_labels[:] = (
        np.arange(16) % 4 == 0
    )  # half and half would cancel the NSP bias's gradient down to its rounding
    batch = unpacked_batch(samples)
    found = {}
    for size in (1, 4, 16):
        config = parse_command_line(
            arguments(
                tmp_path,
                shards,
                training__micro_batch_size=size,
                model__hidden_dropout_prob=0,
                model__attention_probs_dropout_prob=0,
                optimizer__name="adamw",
                optimizer__max_grad_norm=limit,
            )
        )
        engine = make_engine(config, "cpu")
        metrics = engine.step(batch, 0.0, 1)
        found[size] = {name: p.grad for name, p in engine.model.named_parameters()}, metrics
        norm = torch.cat([gradient.flatten() for gradient in found[size][0].values()]).norm()
        assert abs(norm - limit) < 1e-5 * limit if limit else norm > 0.1
    for size in (4, 16):
        for name, gradient in found[1][0].items():
            if not name.endswith("attention.self.key.bias"):  # zero but for rounding
                assert (found[size][0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, value in found[1][1].items():
            assert torch.isclose(found[size][1][name], value, rtol=1e-5), name


@pytest.mark.parametrize("has_kernels", [True, False])
def test_gradients_in_bfloat16_are_those_of_float32_for_any_micro_batch(monkeypatch, has_kernels):
    if not has_kernels:
        monkeypatch.setattr("ops.native.native", lambda dtype: None)
    rows, length, vocab = 48, 128, 500
    samples = random_samples(np.random.default_rng(), rows, length, 16, vocab)
    ranks = np.random.default_rng().pareto(1.0, samples.input_ids.shape)  # a few words are most of all text
    samples.input_ids[:] = np.where(samples.input_ids > 0, np.minimum(5 + 3 * ranks, vocab - 1), 0)
    samples.input_ids[:, 0], samples.nsp_labels[:] = 2, np.arange(rows) % 4 == 0
    batch = unpacked_batch(samples)

    def gradients(precision, size):
        config = Config()
        config.model = ModelConfig(vocab, 64, 2, 2, 128, length, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        config.model.initializer_range = 0.05
        config.data.sequence_length, config.data.mask_tokens = length, 16
        config.training.precision, config.training.micro_batch_size = precision, size
        engine = make_engine(config, "cpu")
        engine.step(batch, 0.0, 1)
        return {name: weight.grad for name, weight in engine.master_weights.items()}

    found = [gradients("float32", rows), *(gradients("bfloat16", size) for size in (1, 2, 4, rows))]
    for name, exact in found[0].items():
        if not name.endswith("attention.self.key.bias"):  # zero but for rounding
            worst = max((one[name] - other[name]).norm() for one in found for other in found)
            assert worst <= 0.02 * exact.norm(), name


def test_dropout_is_on_in_training_and_differs_between_steps_and_micro_batches(tmp_path, shards):
    config = parse_command_line(arguments(tmp_path, shards))
    engine = make_engine(config, "cpu")
    samples = random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB)
    batch = unpacked_batch(samples)
    evaluated = engine.evaluate(batch)["mlm_loss"]
    losses = [engine.step(batch, 0.0, step)["mlm_loss"] for step in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1] and evaluated not in losses
    assert engine.evaluate(batch)["mlm_loss"] == evaluated
    seen = []
    engine.model.register_forward_hook(lambda graph, inputs, outputs: seen.append(outputs[1]["mlm_loss"].item()))
    engine.step({name: np.concatenate([array, array]) for name, array in batch.items()}, 0.0, 1)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_in_bfloat16_the_graph_is_the_rounded_masters_and_small_updates_are_not_lost(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards, training__precision="bfloat16")), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB))
    before = {name: tensor.clone() for name, tensor in engine.weights().items()}
    for step in range(1, 4):
        engine.step(batch, 1e-5, step)  # far below bfloat16's resolution
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, engine.master_weights[name].bfloat16()), (
            name
        )
    moved = [name for name, weight in engine.weights().items() if not torch.equal(weight, before[name])]
    assert len(moved) > 0.9 * len(before)
    other = make_engine(parse_command_line(arguments(tmp_path, shards, training__precision="bfloat16")), "cpu")
    other.load_weights(engine.weights())
    assert other.evaluate(batch)["mlm_loss"] == engine.evaluate(batch)["mlm_loss"]


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out_and_counted(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards)), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(1), 8, LENGTH, MASKS, VOCAB))
    assert engine.step(batch, 1e-3, 1)["skipped_updates"] == 0
    before = {**engine.weights(), **engine.optimizer_state()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    batch["nsp_weights"][0] = np.inf
    assert engine.step(batch, 1e-3, 2)["skipped_updates"] == 1
    after = {**engine.weights(), **engine.optimizer_state()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_signal_in_an_update_waits_for_its_end_and_one_in_a_pass_does_not(tmp_path, shards):
    engine = make_engine(parse_command_line(arguments(tmp_path, shards)), "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(2), 24, LENGTH, MASKS, VOCAB))
    update, kept = engine.optimizer.step, []

    def signal_then_update(learning_rate):
        signal.raise_signal(signal.SIGINT)
        update(learning_rate)

    with interruptible():
        before = {name: tensor.clone() for name, tensor in engine.weights().items()}
        with pytest.raises(KeyboardInterrupt):
            engine.step(batch, 0.1, 1, lambda rows: signal.raise_signal(signal.SIGINT))
        assert engine.steps_done == 0 and all(
            torch.equal(before[name], tensor) for name, tensor in engine.weights().items()
        )
        engine.optimizer.step = signal_then_update
        with pytest.raises(KeyboardInterrupt), protected():
            kept.append(engine.step(batch, 0.1, 1))
        assert engine.steps_done == len(kept) == 1
