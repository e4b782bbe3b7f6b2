"""The tasks of labelled examples: beside transformers' classes, packed and not, from files to predictions, on IPUs."""

import json
import random

import numpy as np
import pytest
import torch
import transformers

from bert.model.batch import Batch
from bert.run.checkpoint import transformers_config
from data.examples.examples import LABELS, make_batch, ranges
from data.examples.loader import batches_to_score
from data.rows import WHOLE
from ops.ipu import lowering
from run_finetuning import main
from tests.bert.run.runs import assert_same_state, read_lines
from tests.bert.tasks.tiny import EXACT, FILES, STILL, make_bert, make_files, open_engine, open_task
from tests.poptorch_contract import sdk

METRICS = {
    "classification": "accuracy",
    "token_classification": "f1",
    "question_answering": "f1",
    "multiple_choice": "accuracy",
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=FILES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def files(name, tmp_path_factory):
    """Options of a run on files of random examples, others in each run of the tests."""
    seed = random.randrange(1 << 20)
    print("seed", seed)
    return make_files(name, tmp_path_factory.mktemp(name), seed=seed)


def counts_of(task, examples):
    return examples.counts if task.output_slots == LABELS.weights else examples.lengths


def inputs_of(task, examples, number):
    """What transformers' class takes of one example."""
    lengths = examples.sequence_lengths[number]
    first = examples.lengths[:number].sum()
    ids, types = torch.zeros(2, 1, len(lengths), lengths.max(), dtype=torch.long)
    for sequence, length in enumerate(lengths):
        ids[0, sequence, :length] = torch.from_numpy(examples.input_ids[first : first + length])
        types[0, sequence, :length] = torch.from_numpy(examples.token_type_ids[first : first + length])
        first += length
    mask = (torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None])[None].long()
    if len(lengths) == 1:
        ids, types, mask = ids[:, 0], types[:, 0], mask[:, 0]
    own = slice(examples.counts[:number].sum(), examples.counts[: number + 1].sum())
    labels = torch.from_numpy(examples.labels[own]).long()
    if task.output_slots == "sample_ids":
        named = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    elif task.architecture == "BertForTokenClassification":
        named = {"labels": torch.full_like(ids, -100)}
        named["labels"][0, torch.from_numpy(examples.positions[own]).long()] = labels
    else:
        named = {"labels": labels}
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, **named}


def logits_of(task, found, inputs):
    if task.output_slots == "sample_ids":
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
    if task.architecture == "BertForTokenClassification":
        return found.logits[0][inputs["labels"][0] != -100]
    return found.logits


def test_logits_and_loss_are_those_of_transformers_class(bert, files):
    config, task, examples = open_task(bert, [*files, *EXACT, *STILL])
    engine, shape = open_engine(config), task.row_shape(config.data, 1)
    model = engine.model
    described = {**transformers_config(config.model, model.architecture, task.architecture), **task.config()}
    peer = getattr(transformers, task.architecture)(transformers.BertConfig(**described)).eval()
    peer.load_state_dict(model.state_dict())
    for number in range(12):
        batch, _ = make_batch(examples, np.array([number]), shape, "off")
        inputs = inputs_of(task, examples, number)
        with torch.no_grad():
            found = peer(**inputs)
        expected = logits_of(task, found, inputs).numpy()
        np.testing.assert_allclose(engine.predict(batch.arrays), expected, rtol=1e-5, atol=1e-5)
        if batch.predictions:  # transformers' loss of none is no number
            losses = engine.evaluate(batch.arrays)
            assert float(losses[task.panels[0].loss]) == pytest.approx(float(found.loss), rel=1e-5, abs=1e-5)


def passes(engine, arrays):
    """(metrics, gradients)"""
    metrics = engine.passes(arrays, 1, lambda rows: None)
    gradients = {name: weight.grad.clone() for name, weight in engine.master_weights.items()}
    return {name: float(value) for name, value in metrics.items()}, gradients


def passes_of_rows(engine, arrays):
    """The same of the form that has padding."""
    engine.clear_gradients()
    loss, metrics = engine.model.train()(Batch.of_rows(engine.to_device(arrays)))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in engine.master_weights.items()}
    return {name: float(value) for name, value in metrics.items()}, gradients


def outputs_of(task, examples, shape, packing, predict):
    """In the order of the examples, as they are scored."""
    counts = counts_of(task, examples)
    outputs = np.full((counts.sum(), task.output_size), np.nan, np.float32)
    for batch in batches_to_score(examples, shape, 16, packing, WHOLE):
        places = ranges((np.cumsum(counts) - counts)[batch.examples], counts[batch.examples])
        outputs[places] = predict(batch.arrays)
    return outputs


def test_packed_loss_gradient_and_outputs_are_those_of_one_example_a_row(bert, files):
    config, task, examples = open_task(bert, [*files, *EXACT, *STILL, "--training.micro_batch_size", "4"])
    engine, shape = open_engine(config), task.row_shape(config.data, 5)
    assert engine.unpads
    chosen = np.random.default_rng().permutation(len(examples))[:32]
    expected, gradients = passes(engine, make_batch(examples, chosen, shape, "off")[0].arrays)
    of_rows = outputs_of(task, examples, shape, "off", engine.predict)
    assert np.isfinite(of_rows).all()

    def predict_rows(arrays):
        with torch.no_grad():
            found = engine.model.eval().whole(Batch.of_rows(engine.to_device(arrays))).outputs.numpy()
        return found[arrays[task.output_slots].ravel() != 0]

    def predict_lowered(arrays):
        with lowering():
            return predict_rows(arrays)

    for packing, run, predict in (
        ("samples", passes, engine.predict),
        ("off", passes_of_rows, predict_rows),
        ("samples", passes_of_rows, predict_rows),
        ("samples", passes_of_rows, predict_lowered),
    ):
        batch, taken = make_batch(examples, chosen, shape, packing)
        assert taken == 32 and batch.rows < 32 or packing == "off"
        metrics, own = run(engine, batch.arrays)
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for weight, gradient in gradients.items():
            assert (own[weight] - gradient).abs().max() <= 2e-6 * max(1, gradient.abs().max()), weight
        found = outputs_of(task, examples, shape, packing, predict)
        np.testing.assert_allclose(found, of_rows, rtol=2e-6, atol=2e-6)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_scores_predicts_draws_and_resumes_bit_for_bit(bert, name, files, tmp_path):
    learning = ["--optimizer.learning_rate", "0.01", "--training.global_batch_size", "12", "--training.epochs", "5"]
    command = [*files, *learning, *EXACT, "--model", bert, "--training.log_every", "1"]
    whole, parts = [*command, "--training.output", str(tmp_path / "whole")], tmp_path / "parts"
    assert main(whole) == 0
    lines, held_out = read_lines(tmp_path, "whole"), lines_of(tmp_path / "whole" / "held_out.jsonl")
    first, last = (sum(line["loss"] for line in some) / 4 for some in (lines[:4], lines[-4:]))
    assert last < first - 0.02
    assert len(held_out) == 5 and all(0 <= line[METRICS[name]] <= 1 for line in held_out)
    assert len(lines_of(tmp_path / "whole" / "predictions.jsonl")) == 20
    assert (tmp_path / "whole" / "predictions.png").stat().st_size > 1000
    for stop in (3, len(lines)):
        again = ["--training.stop_at_step", str(stop), "--resume", "auto", "--training.output", str(parts)]
        assert main([*command, *again]) == 0
    last = f"step_{len(lines):08}"
    assert_same_state(str(tmp_path / "whole" / "checkpoints" / last), str(parts / "checkpoints" / last))
    assert lines_of(parts / "held_out.jsonl") == held_out


IPUS = ["--device", "ipu", "--ipu.layers_per_ipu", "[0, 2]", "--ipu.micro_batch_size", "2"]
IPUS += ["--ipu.gradient_accumulation_steps", "6", "--ipu.replication_factor", "1", "--optimizer.max_grad_norm", "0"]


@pytest.mark.ipu
@pytest.mark.parametrize("packing", ["off", pytest.param("rows", marks=pytest.mark.exhaustive)])
def test_a_step_and_predictions_on_ipus_are_those_of_the_cpu(bert, name, files, tmp_path, monkeypatch, packing):
    sdk(monkeypatch)
    exact = [*EXACT, *STILL, "--training.epochs", "null", "--data.packing", packing, "--data.samples_per_row", "3"]
    exact += ["--training.global_batch_size", "12", "--ipu.executable_cache_dir", str(tmp_path), "--optimizer.eps", "1"]
    config, task, examples = open_task(bert, [*files, *exact, *IPUS])
    shape = task.row_shape(config.data, 1 if packing == "off" else 3)
    batch, _ = make_batch(examples, np.arange(36), shape, packing, 12)
    if packing == "off":
        batch, _ = make_batch(examples, np.arange(12), shape, packing)
    engines = [open_engine(config, device) for device in ("cpu", "ipu")]
    cpu, ipu = [engine.step(batch.arrays, 0.1, 1) for engine in engines]
    assert {key: float(ipu[key]) for key in ipu} == pytest.approx({key: float(cpu[key]) for key in cpu}, rel=1e-5)
    weights, expected = (engine.weights() for engine in reversed(engines))
    for key, weight in expected.items():
        assert (weights[key] - weight).norm() <= 1e-5 * weight.norm(), key
    outputs = [outputs_of(task, examples, shape, packing, engine.predict) for engine in engines]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
