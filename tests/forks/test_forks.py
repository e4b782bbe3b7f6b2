"""The forks run as whole runs: they learn, they resume exactly, and what they change is what changes."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import run_pretraining
from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.optimizers import OPTIMIZERS, make_optimizer
from bert.run.checkpoint import read_safetensors
from bert.schedules import SCHEDULES, learning_rate_at
from data.errors import InputError
from data.loading.loader import Loader, LoaderSettings
from data.loading.shard_files import open_shards
from data.masking import CHOICES, mask_budget
from data.rows import packed_batch, unpacked_batch
from data.samples import check_samples
from data.shards import read_samples
from tests import ROOT
from tests.bert.run.runs import (
    LENGTH,
    MASKS,
    VOCAB,
    arguments,
    assert_same_state,
    checkpoints,
    make_shards,
    read_lines,
)
from tests.make_samples import random_samples

NO_DROPOUT = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0}


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


@pytest.fixture(autouse=True)
def tables_as_before():
    """Takes out again what a fork registers, and the fork, so that its next import registers it."""
    tables = [(table, dict(table)) for table in (OPTIMIZERS, SCHEDULES, CHOICES)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in [name for name in sys.modules if name.startswith("tests.forks.") and "test_" not in name]:
        del sys.modules[name]


def load_fork(name):
    return importlib.import_module("tests.forks." + name)


def run_in_two_parts(main, tmp_path, shards, **options):
    """Runs a fork whole and, beside it, stopped and resumed; both end in the same state."""
    assert main(arguments(tmp_path, shards, **options)) == 0
    for changes in ({"training__stop_at_step": 5}, {"resume": "auto"}):
        assert main(arguments(tmp_path, shards, **options, **changes, training__output=tmp_path / "parts")) == 0
    assert_same_state(checkpoints(tmp_path)[-1], checkpoints(tmp_path, "parts")[-1])
    losses = [line["loss"] for line in read_lines(tmp_path)]
    assert losses[-1] < losses[0] - 0.02
    return read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "model.safetensors"))


def test_no_fork_is_longer_than_sixty_lines():
    folder = os.path.join(ROOT, "tests", "forks")
    lines = {}
    for name in os.listdir(folder):
        if name.endswith(".py") and not name.startswith(("test_", "__")):
            with open(os.path.join(folder, name)) as file:
                lines[name] = len(file.readlines())
    assert len(lines) == 5 and max(lines.values()) <= 60, lines


def test_geglu_and_rotary_positions(tmp_path, shards, capsys):
    geglu_rotary = load_fork("geglu_rotary")

    weights = run_in_two_parts(geglu_rotary.main, tmp_path, shards)
    assert "bert.embeddings.position_embeddings.weight" not in weights
    assert weights["bert.encoder.layer.1.intermediate.up.weight"].shape == (64, 32)
    # BERT does not take it for its own.
    start = {"training__start_from": checkpoints(tmp_path)[-1], "training__output": tmp_path / "bert"}
    assert run_pretraining.main(arguments(tmp_path, shards, **start)) == 2
    assert "model_type is 'bert-geglu-rotary', expected 'bert'" in capsys.readouterr().err


def test_rotary_positions_are_relative_and_count_within_a_sample(tmp_path, shards):
    geglu_rotary = load_fork("geglu_rotary")

    sharp = {**NO_DROPOUT, "model__initializer_range": 0.4}  # so that attention depends on where tokens are
    config = parse_command_line(arguments(tmp_path, shards, **sharp))
    engine = make_engine(config, "cpu", geglu_rotary.make_model)
    samples = random_samples(np.random.default_rng(), 16, LENGTH, MASKS, VOCAB)
    rows, packed = unpacked_batch(samples), packed_batch(samples, 4)
    loss = engine.evaluate(rows)["mlm_loss"]
    assert torch.isclose(engine.evaluate(packed)["mlm_loss"], loss, rtol=1e-5)
    shifted = {**rows, "position_ids": rows["position_ids"] + 1000}
    assert torch.isclose(engine.evaluate(shifted)["mlm_loss"], loss, rtol=1e-4)
    stretched = {**rows, "position_ids": rows["position_ids"] * 3}
    assert not torch.isclose(engine.evaluate(stretched)["mlm_loss"], loss, rtol=1e-4)


def test_shared_layers(tmp_path, shards):
    shared_layers = load_fork("shared_layers")

    weights = run_in_two_parts(shared_layers.main, tmp_path, shards)
    assert not any(".layer.1." in name for name in weights)
    config = parse_command_line(arguments(tmp_path, shards, **NO_DROPOUT))
    shared, plain = make_engine(config, "cpu", shared_layers.make_model), make_engine(config, "cpu")
    batch = unpacked_batch(random_samples(np.random.default_rng(), 8, LENGTH, MASKS, VOCAB))
    own = shared.weights()
    plain.load_weights({name: own[name.replace(".layer.1.", ".layer.0.")] for name in plain.weights()})
    assert shared.evaluate(batch)["mlm_loss"] == plain.evaluate(batch)["mlm_loss"]
    shared.step(batch, 0.0, 1), plain.step(batch, 0.0, 1)
    gradients = [{name: p.grad for name, p in engine.model.named_parameters()} for engine in (shared, plain)]
    name = "bert.encoder.layer.0.output.dense.weight"
    both = gradients[1][name] + gradients[1][name.replace(".layer.0.", ".layer.1.")]
    assert torch.allclose(gradients[0][name], both, rtol=1e-4, atol=1e-7)


def test_a_schedule(tmp_path, shards):
    load_fork("inverse_square_root")

    options = {"optimizer__schedule": "inverse_square_root"}
    run_in_two_parts(run_pretraining.main, tmp_path, shards, **options)
    config = parse_command_line(arguments(tmp_path, shards, **options)).optimizer
    rates = [line["learning_rate"] for line in read_lines(tmp_path)]
    assert rates == [learning_rate_at(step, config, 12) for step in range(1, 13)]
    assert rates[2] == config.learning_rate and rates[11] == pytest.approx(config.learning_rate * (3 / 12) ** 0.5)


def test_an_optimizer(tmp_path, shards):
    load_fork("lion")

    options = {"optimizer__name": "lion", "optimizer__learning_rate": 0.002}
    run_in_two_parts(run_pretraining.main, tmp_path, shards, **options)
    state = read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "optimizer.safetensors"))
    weights = read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "model.safetensors"))
    assert state.keys() == {name + ".exp_avg" for name in weights}


def test_an_update_of_lion_is_the_papers(tmp_path, shards):
    load_fork("lion")

    config = parse_command_line(arguments(tmp_path, shards, optimizer__name="lion")).optimizer
    weight = torch.nn.Parameter(torch.randn(4, 5))
    before, moment = weight.detach().clone(), torch.zeros(4, 5)
    optimizer = make_optimizer([("w", weight)], config)
    for _ in range(3):
        weight.grad = torch.randn(4, 5)
        direction = torch.sign(0.9 * moment + 0.1 * weight.grad)
        before = before - 0.01 * (direction + config.weight_decay * before)
        moment = config.betas[1] * moment + (1 - config.betas[1]) * weight.grad
        optimizer.step(0.01)
    assert torch.allclose(weight, before, atol=1e-6)


def spans_of(shard):
    """The lengths of the runs of masked tokens, and how many tokens each sample has and has masked."""
    samples = read_samples(shard, 0, 10**6)
    runs = []
    for positions, count in zip(samples.mlm_positions.astype(int), samples.mlm_counts):
        breaks = np.flatnonzero(np.diff(positions[:count]) != 1) + 1
        runs += [len(run) for run in np.split(positions[:count], breaks)]
    return np.array(runs), samples


@pytest.mark.parametrize("workers", ["1", "2"])
def test_span_masking(tmp_path, workers):
    command = [sys.executable, "-m", "tests.forks.span_masking", "--input", "python", "--masked-units", "spans"]
    command += ["--vocab-size", "500", "--sequence-length", "64", "--mask-tokens", "10", "--workers", workers]
    subprocess.run(command + ["--output", str(tmp_path / "spans")], cwd=ROOT, check=True, capture_output=True)
    runs, samples = spans_of(str(tmp_path / "spans" / "train-00000.h5"))
    check_samples(samples, 500, "")
    budget = mask_budget(samples.lengths, samples.first_lengths, 0.15, 10)
    assert (samples.mlm_counts <= budget).all() and samples.mlm_counts.sum() > 0.97 * budget.sum()
    # SpanBERT's mean is 3.8; spans that touch count as one, the last one of a sample is cut.
    assert 2.5 < runs.mean() < 4.5 and runs.max() <= 10 and (runs > 1).mean() > 0.6
    shown = np.take_along_axis(samples.input_ids, samples.mlm_positions.astype(int), axis=1)
    used = np.arange(10) < samples.mlm_counts[:, None]
    assert 0.78 < (shown == 4)[used].mean() < 0.82


def test_span_masking_anew_in_each_epoch(tmp_path):
    span_masking = load_fork("span_masking")

    folder = str(tmp_path / "dynamic")
    options = ["--input", "python", "--masked-units", "spans", "--masking", "dynamic", "--output", folder]
    options += ["--vocab-size", "500", "--sequence-length", "64", "--mask-tokens", "10"]
    assert span_masking.prepare.main(options) == 0
    shards = open_shards([folder + "/train-*.h5"])
    settings = LoaderSettings(batch_size=512, seed=1)
    with Loader(shards, settings) as loader:
        rows = loader.next().arrays
        neighbours = np.diff(rows["mlm_positions"], axis=1) == 1
        assert neighbours[rows["mlm_weights"][:, 1:] > 0].mean() > 0.5
    with pytest.MonkeyPatch.context() as patch:  # where the fork was not imported
        patch.delitem(CHOICES, "spans")
        with pytest.raises(InputError, match="train-00000.h5.*'spans'.*expected tokens or words"):
            Loader(shards, settings)


def test_a_fork_is_a_command_of_its_own(tmp_path, shards, capsys):
    shared_layers = load_fork("shared_layers")

    words = arguments(tmp_path, shards, optimizer__name="adan")
    assert shared_layers.main(words) == 2
    assert 'optimizer.name is "adan", expected one of lamb, adamw, muon' in capsys.readouterr().err
    with open(words[1]) as file:
        assert json.load(file)["training"]["max_steps"] == 12
