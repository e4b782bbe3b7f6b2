"""The search for the largest micro-batch that fits, and what happens where it does not after all."""

import logging

import numpy as np
import pytest
import torch

from bert.config import Config, ModelConfig, TrainingConfig
from bert.engines import make_engine
from bert.engines.micro_batch import full_rows, largest_that_fits
from bert.engines.torch_devices import Cpu
from data.errors import InputError
from data.rows import MLM, NSP, RowShape, unpacked_batch, unpad
from tests.make_samples import random_samples


@pytest.mark.parametrize(
    "available, most, expected",
    [(10**6, 64, 64), (5000, 64, 45), (5000, 20, 20), (630, 64, 1), (5000, 8, 8), (1200, 8, 7), (0, 64, 0)],
)
def test_the_largest_number_of_rows_that_fits_is_found(available, most, expected):
    assert largest_that_fits(lambda rows: 500 + 100 * rows, available, most) == expected


def test_where_memory_grows_faster_than_two_tries_foretell_rows_are_cut_until_they_fit():
    tried = []

    def peak_of(rows):
        tried.append(rows)
        if rows > 60:
            raise torch.OutOfMemoryError("out of memory")
        return 500 + 100 * rows + (1000 if rows > 50 else 0)

    rows = largest_that_fits(peak_of, 6500, 1000)
    assert rows == 45 and peak_of(rows) <= 6500 and len(tried) < 12


@pytest.mark.parametrize("limit", [1, 4, 20, 31, 100])
def test_running_out_of_memory_in_any_try_makes_fewer_rows(limit):
    def peak_of(rows):
        if rows > limit:
            raise torch.OutOfMemoryError("out of memory")
        return 100 * rows

    assert limit // 2 < largest_that_fits(peak_of, 10**6, 1024) <= limit


def test_full_rows_use_every_slot():
    batch = full_rows(3, RowShape(20, 7, 6), (MLM, NSP))
    assert (batch["sample_ids"] > 0).all() and set(batch["sample_ids"].ravel()) == {1, 2, 3, 4, 5, 6}
    rows = np.arange(3)[:, None]
    assert (batch["sample_ids"][rows, batch["cls_positions"]] == [[1, 2, 3, 4, 5, 6]] * 3).all()
    tokens = unpad(batch, static=True)
    assert len(tokens["input_ids"]) == 60 and len(tokens["mlm_labels"]) == 21 and len(tokens["cu_seqlens"]) == 3 * 6 + 1


class Card(Cpu):
    """The CPU, with a memory that counts the bytes of a micro-batch."""

    def __init__(self, size):
        self.memory, self.size, self.sent, self.most = self, size, 0, 0

    def card(self):
        return "card of tests"

    def available_bytes(self):
        return self.size

    def reset_peak(self):
        self.most = 0

    def peak_bytes(self):
        return self.most

    def fork_random(self):
        self.sent = 0
        return super().fork_random()

    def to_device(self, tensor):
        self.sent += tensor.numel() * tensor.element_size()
        self.most = max(self.most, self.sent // 2)  # a try is two passes
        return tensor


def engine_on(card, monkeypatch, **training):
    monkeypatch.setattr("bert.engines.Cpu", lambda: card)
    model = ModelConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    config = Config(model=model, training=TrainingConfig(**{"precision": "float32", **training}))
    config.data.sequence_length, config.data.mask_tokens = 32, 4
    return make_engine(config, "cpu")


def test_an_engine_takes_the_most_rows_that_fit_beside_the_optimizers_state(monkeypatch):
    whole = engine_on(Card(10**9), monkeypatch)
    assert whole.micro_batch_size == Cpu.hidden_bytes // (4 * 32 * 16)
    state = 8 * sum(weight.numel() for weight in whole.weights().values())  # LAMB's two moments
    assert whole.optimizer.state_bytes() == state
    card = Card(state + 100_000)
    engine = engine_on(card, monkeypatch)
    assert 0.8 * 100_000 < card.most <= 100_000 and 8 < engine.micro_batch_size < 1000
    assert all(weight.grad is None for weight in engine.model.parameters())
    rows = engine.micro_batch_size
    engine.expect_rows(3 * rows // 2)  # cut into two of about the same size
    assert 3 * rows // 4 <= engine.micro_batch_size < 3 * rows // 4 + 16
    set_by_hand = engine_on(Card(state), monkeypatch, micro_batch_size=4)
    set_by_hand.expect_rows(5)
    assert set_by_hand.micro_batch_size == 4


def test_where_not_even_one_row_fits_the_error_names_the_card(monkeypatch):
    with pytest.raises(InputError, match="not even a micro-batch of one row of 32 tokens fits .* card of tests"):
        engine_on(Card(1000), monkeypatch)


def batch_of(samples, length=32, masks=4):
    return unpacked_batch(random_samples(np.random.default_rng(3), samples, length, masks, 100))


def run_out_of_memory_beyond(rows, engine, monkeypatch):
    """A micro-batch of more rows fails when it has added its gradients already."""
    backward = engine.backward

    def fail(loss):
        backward(loss)
        if engine.micro_batch_size > rows:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine, "backward", fail)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_that_runs_out_of_memory_is_that_of_smaller_micro_batches(monkeypatch, caplog, precision):
    batch, done = batch_of(70), []
    expected, engine = [
        engine_on(Card(10**9), monkeypatch, micro_batch_size=size, precision=precision) for size in (24, 64)
    ]
    run_out_of_memory_beyond(30, engine, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="bert"):
        for step in (1, 2):
            found, right = engine.step(batch, 0.01, step, done.append), expected.step(batch, 0.01, step)
            assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    weights = expected.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in engine.weights().items())
    assert sum(done) == 2 * 70 and engine.micro_batch_size == 24
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "out of memory: micro-batches of 48 rows from now on, not 64",
        "out of memory: micro-batches of 32 rows from now on, not 48",
        "out of memory: micro-batches of 24 rows from now on, not 32",
    ]


def test_where_one_row_does_not_fit_or_memory_is_not_the_devices_the_error_is_raised(monkeypatch):
    for card, size in ((Card(10**9), 3), (Cpu(), 64)):
        engine = engine_on(card, monkeypatch, micro_batch_size=size)
        run_out_of_memory_beyond(0, engine, monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step(batch_of(8), 0.01, 1)
        assert engine.micro_batch_size == (1 if card.memory else 64) and engine.steps_done == 0
