"""task.nsp false: MLM alone, from the shards to a checkpoint that transformers loads, and to and from runs with NSP."""

import json
import os

import matplotlib.figure
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, BertForMaskedLM

from bert.run.checkpoint import read_safetensors
from data.shards import write_shard
from data.tokenizer import read_vocab, vocab_sha256
from run_pretraining import main
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, checkpoints, make_shards, read_lines
from tests.make_samples import random_samples

NSP_ALONE = {
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}


def make_shards_of(segments, folder):
    """A training shard and a held-out one."""
    make_shards(folder)
    tokens = read_vocab(str(folder / "vocab.txt")).tokens
    (folder / "train-00001.h5").rename(folder / "held_out-00000.h5")
    if segments == 1:
        for path, count in (("train-00000.h5", 67), ("held_out-00000.h5", 33)):
            samples = random_samples(np.random.default_rng(count), count, LENGTH, MASKS, VOCAB)
            samples.first_lengths[:], samples.nsp_labels[:] = samples.lengths, 0
            write_shard(str(folder / path), samples, VOCAB, vocab_sha256(tokens), {}, segments=1)
    return folder


def weights(tmp_path, run="run"):
    return read_safetensors(os.path.join(checkpoints(tmp_path, run)[-1], "model.safetensors"))


@pytest.mark.parametrize("segments", [1, 2])
def test_a_run_says_logs_draws_and_saves_mlm_alone(tmp_path, capsys, monkeypatch, segments):
    titles, savefig = [], matplotlib.figure.Figure.savefig

    def save_and_note(figure, *values, **options):
        titles.extend(axes.get_title() for axes in figure.axes)
        savefig(figure, *values, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save_and_note)
    shards = make_shards_of(segments, tmp_path / "shards")
    options = {"task__nsp": "false", "data__held_out_files": shards / "held_out-*.h5"}
    assert main(arguments(tmp_path, shards, **options)) == 0
    said, lines = capsys.readouterr().out, read_lines(tmp_path)
    assert "mlm " in said and "held out (33 samples): loss" in said and "nsp" not in said
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert list(held_out) == ["step", "samples", "loss", "mlm_loss", "mlm_accuracy"] and held_out["samples"] == 33
    for values in (*lines, held_out):
        assert values["loss"] == values["mlm_loss"] and not any("nsp" in name for name in values)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02
    assert titles == ["MLM loss", "learning rate"]

    path = checkpoints(tmp_path)[-1]
    model, report = BertForMaskedLM.from_pretrained(path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == ["BertForMaskedLM"]
    assert torch.equal(model.cls.predictions.bias, weights(tmp_path)["cls.predictions.bias"])
    assert isinstance(AutoModelForPreTraining.from_pretrained(path).bert, type(model.bert))
    _, report = AutoModel.from_pretrained(path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_run_with_nsp_starts_from_mlm_alone_and_the_reverse(tmp_path, capsys):
    shards, still = make_shards_of(2, tmp_path / "shards"), {"training__stop_at_step": 1}
    assert main(arguments(tmp_path, shards, task__nsp="false", **still, training__output=tmp_path / "mlm")) == 0
    still["optimizer__learning_rate"] = 1e-30
    before = weights(tmp_path, "mlm")
    start = {"training__start_from": checkpoints(tmp_path, "mlm")[-1], "training__output": tmp_path / "both"}
    assert main(arguments(tmp_path, shards, **still, **start)) == 0
    assert "newly initialised" in (said := capsys.readouterr().out) and all(name in said for name in NSP_ALONE)
    both = weights(tmp_path, "both")
    assert both.keys() - before.keys() == NSP_ALONE
    assert all(torch.equal(both[name], tensor) for name, tensor in before.items())
    start = {"training__start_from": checkpoints(tmp_path, "both")[-1], "training__output": tmp_path / "back"}
    assert main(arguments(tmp_path, shards, task__nsp="false", **still, **start)) == 0
    back = weights(tmp_path, "back")
    assert back.keys() == before.keys() and all(torch.equal(back[name], tensor) for name, tensor in before.items())


def test_samples_of_one_segment_hold_nothing_for_nsp(tmp_path, capsys):
    shards = make_shards_of(1, tmp_path / "shards")
    assert main(arguments(tmp_path, shards)) == 2
    message = capsys.readouterr().err
    assert "train-00000.h5: its samples have one segment" in message and "task.nsp to false" in message
    assert not (tmp_path / "run").exists()


def test_a_run_of_mlm_alone_is_not_continued_with_nsp(tmp_path, capsys):
    shards = make_shards_of(2, tmp_path / "shards")
    assert main(arguments(tmp_path, shards, task__nsp="false", training__stop_at_step=1)) == 0
    assert main(arguments(tmp_path, shards, resume="auto")) == 2
    assert "task.nsp is false there, expected true" in capsys.readouterr().err
