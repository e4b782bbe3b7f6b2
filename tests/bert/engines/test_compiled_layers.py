"""Compiled layers on the CPU, with attention that can be traced in place of the one for CUDA: when they are compiled
anew, and what happens where they cannot be."""

import functools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.runtime.triton_heuristics import NoTritonConfigsError

from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.torch_devices import Cpu
from data.errors import InputError
from data.rows import packed_batch
from ops.attention import SampleMask, attention
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, make_shards
from tests.make_samples import random_samples


class Compiling(Cpu):
    compiles_kernels = True


def traceable_attention(query, key, value, segments, heads, dropout):
    """Of unpadded tokens, as one row with a mask."""
    tokens = torch.arange(len(query), dtype=torch.int32)
    ids = torch.bucketize(tokens, segments.cu_seqlens, right=True)
    mask = SampleMask((ids[:, None] == ids[None, :])[None, None])
    return attention(query[None], key[None], value[None], mask, heads, dropout)[0]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """engine(compile) of micro-batches of 8 rows, without dropout; `backend` is what compiles."""
    monkeypatch.setattr("bert.engines.Cpu", Compiling)
    monkeypatch.setattr("bert.model.blocks.attention", traceable_attention)
    torch._dynamo.reset()
    shards = make_shards(tmp_path / "shards")

    def make(compiled, backend="aot_eager"):
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
        changes = dict(model__hidden_dropout_prob=0, model__attention_probs_dropout_prob=0, training__compile=compiled)
        return make_engine(parse_command_line(arguments(tmp_path, shards, **changes)), "cpu")

    yield make
    torch._dynamo.reset()


def batch_of(samples, seed):
    return packed_batch(random_samples(np.random.default_rng(seed), samples, LENGTH, MASKS, VOCAB), 6)


def gradients(engine):
    return {name: parameter.grad.clone() for name, parameter in engine.model.named_parameters()}


def assert_close(found, expected):
    for name, gradient in expected.items():
        if not name.endswith("attention.self.key.bias"):  # zero but for rounding
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_layers_are_compiled_once_for_any_number_of_samples(engine):
    plain, compiled = engine("off"), engine("on")
    assert compiled.unpads and compiled.static
    batches = [batch_of(samples, samples) for samples in (12, 17, 9, 30, 3)]
    spans = [len(micro.segments.cu_seqlens) for batch in batches for _, micro in compiled.micro_batches(batch)]
    assert len(set(spans)) > 4
    compiled.step(batches[0], 0.0, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, batch in enumerate(batches):
            compiled.step(batch, 0.0, step)
            plain.step(batch, 0.0, step)
            assert_close(gradients(compiled), gradients(plain))


def fails(graph, inputs):
    raise NoTritonConfigsError("no code for this")


def fails_in_backward(graph, inputs):
    """A backend whose code for the backward pass fails as it is made, when the first backward pass runs."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fails)(graph, inputs)


@pytest.mark.parametrize("backend", [fails, fails_in_backward])
def test_a_layer_that_cannot_be_compiled_runs_uncompiled_and_says_so_once(engine, backend, caplog, monkeypatch):
    monkeypatch.setattr(Cpu, "auto_compile", True)
    expected, broken = engine("off"), engine("auto", backend)
    assert "encoder layers compiled" in broken.describe()
    batch, done = batch_of(40, 0), []
    with caplog.at_level(logging.WARNING, logger="bert"):
        found = [broken.step(batch, 0.01, step, done.append) for step in (1, 2)]
    assert found[0].keys() == found[1].keys()
    for step in (1, 2):
        metrics = expected.step(batch, 0.01, step)
        assert all(torch.isclose(found[step - 1][name], metrics[name], rtol=1e-4) for name in metrics)
    assert_close(gradients(broken), gradients(expected))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "encoder layers cannot be compiled" in line and "no code for this" in line and "\n" not in line
    assert "not compiled (the compiler fails)" in broken.describe()
    assert sum(done) == 2 * len(batch["input_ids"])


def test_where_compiled_layers_are_asked_for_a_compiler_that_fails_is_an_error(engine):
    with pytest.raises(InputError, match='training.compile is "on".*no code for this.*"auto"'):
        engine("on", fails).step(batch_of(8, 0), 0.01, 1)


def test_an_error_that_is_not_the_compilers_is_raised(engine, monkeypatch):
    def breaks(*arguments):
        raise ValueError("a bug")

    for setting in ("off", "on"):
        monkeypatch.setattr("bert.model.blocks.attention", breaks)
        with pytest.raises(ValueError, match="a bug"):
            engine(setting).step(batch_of(8, 0), 0.0, 1)
