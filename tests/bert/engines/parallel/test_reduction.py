"""Which gradients are summed when, while the backward pass still runs."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.parallel.reduction import ALIGNMENT, DataParallel, flatten, with_next
from data.rows import unpacked_batch
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, make_shards
from tests.forks import shared_layers
from tests.make_samples import random_samples


class TwoAlike:
    """The processes as one of two sees them that have the same rows."""

    def __init__(self, failures=()):
        self.failures = list(failures)

    def meet(self, number=0):
        return number

    def agree(self, values):
        return [max(values[0], self.failures.pop() if self.failures else 0), *values[1:]]

    def naming_who_is_lost(self):
        return torch.no_grad()


class Sum:
    def __init__(self, flat):
        flat.mul_(2)  # what is added to it later would be counted once

    def wait(self):
        pass


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(precision, failures, **parts): the engine of one of two processes, another that is alone, and how many sums
    had begun as the last backward pass was over."""
    monkeypatch.setattr("bert.engines.parallel.reduction.BUCKET_BYTES", 20_000)
    shards = make_shards(tmp_path / "shards")
    begun = []

    def make(precision="float32", failures=(), **parts):
        words = arguments(tmp_path, shards, training__precision=precision, model__hidden_dropout_prob=0)
        config = parse_command_line([*words, "--model.attention_probs_dropout_prob", "0"])
        engine, alone = make_engine(config, "cpu", **parts), make_engine(config, "cpu", **parts)
        engine.parallel = DataParallel(TwoAlike(failures), engine.model, engine.master_weights, engine.fold)
        finish = engine.parallel.finish
        engine.parallel.finish = lambda failed: (begun.append(len(engine.parallel.sums)), finish(failed))[1]
        monkeypatch.setattr(dist, "all_reduce", lambda flat, async_op: Sum(flat))
        return engine, alone, begun

    return make


def random_batch(rows=24):
    return unpacked_batch(random_samples(np.random.default_rng(), rows, LENGTH, MASKS, VOCAB))


def gradients(engine):
    return {name: weight.grad.clone() for name, weight in engine.master_weights.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [{}, {"make_model": shared_layers.make_model}])
def test_sums_begin_inside_the_last_backward_pass_and_are_right(make, precision, parts):
    engine, alone, begun = make(precision, **parts)
    batch = random_batch()
    engine.step(batch, 0.0, 1)
    alone.step(batch, 0.0, 1)
    buckets = engine.parallel.buckets
    assert sorted(name for _, names in buckets for name in names) == sorted(engine.master_weights)
    assert len(buckets) > 3 and begun == [sum(block > 0 for block, _ in buckets)] and begun[0] > 0
    for name, gradient in gradients(alone).items():
        assert torch.equal(engine.master_weights[name].grad, 2 * gradient), name


def test_a_pass_that_fails_anywhere_is_done_again_everywhere(make):
    engine, alone, begun = make(failures=[1])
    batch, rows = random_batch(), []
    metrics = engine.step(batch, 0.0, 1, rows.append)
    assert len(begun) == 2 and sum(rows) == 48
    assert metrics["mlm_loss"] == alone.step(batch, 0.0, 1)["mlm_loss"]
    for name, gradient in gradients(alone).items():
        assert torch.equal(engine.master_weights[name].grad, 2 * gradient), name


def test_a_parameter_that_no_process_has_a_gradient_of_gets_none(make):
    engine, _, _ = make()
    unused = torch.nn.Parameter(torch.ones(3))
    engine.model.register_parameter("unused", unused)
    engine.parameters["unused"] = engine.master_weights["unused"] = unused
    engine.parallel = DataParallel(TwoAlike(), engine.model, engine.master_weights, engine.fold)
    engine.step(random_batch(), 0.0, 1)
    assert unused.grad is None and engine.model.bert["embeddings"].word_embeddings.weight.grad is not None


def test_a_process_without_rows_gives_zeros(make):
    engine, _, begun = make()
    engine.parallel.processes.agree = lambda values: [0, *[1] * len(values[1:])]  # the other one has rows
    engine.step({name: array[:0] for name, array in random_batch().items()}, 0.0, 1)
    assert begun == [0] and all((gradient == 0).all() for gradient in gradients(engine).values())


def test_gradients_begin_where_kernels_read_well():
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 16, 1)]
    weights[0].grad, weights[2].grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])
    flat = flatten(weights)
    assert [w.grad.storage_offset() % ALIGNMENT for w in weights] == [0, 0, 0] and flat.sum() == 10
    assert torch.equal(weights[0].grad, torch.tensor([1.0, 2.0, 3.0])) and (weights[1].grad == 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_item_comes_with_the_one_after_it(count):
    items = list(range(count))
    assert list(with_next(iter(items))) == list(zip(items, [*items[1:], None]))
