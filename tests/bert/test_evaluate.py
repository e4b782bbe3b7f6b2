"""`python -m bert.evaluate`: transformers' losses on the same masked samples, of every kind of folder."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from bert.evaluate import main
from data.shards import read_samples
from tests import assert_help_teaches
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, make_shards


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def save(kind, tmp_path, shards):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.3
    )
    model = kind(BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.copyfile(shards / "vocab.txt", tmp_path / "model" / "vocab.txt")
    return model, [str(tmp_path / "model"), "--data.files", str(shards / "train-*.h5"), "--device", "cpu"]


def losses_of(model, shards):
    """transformers' MLM loss, MLM accuracy and, where there is a head for it, NSP loss, over all samples."""
    logits, labels, nsp = [], [], []
    for path in sorted(shards.glob("*.h5")):
        samples = read_samples(str(path), 0, 100)
        slots = np.arange(LENGTH)
        inside = torch.from_numpy((slots < samples.lengths[:, None]).astype(np.int64))
        types = inside * torch.from_numpy((slots >= samples.first_lengths[:, None]).astype(np.int64))
        ids = torch.from_numpy(samples.input_ids.astype(np.int64))
        with torch.no_grad():
            output = model(ids, attention_mask=inside, token_type_ids=types)
        used = np.arange(MASKS) < samples.mlm_counts[:, None]
        row, slot = np.nonzero(used)
        predictions = output.prediction_logits if "prediction_logits" in output else output.logits
        logits.append(predictions[row, samples.mlm_positions[row, slot].astype(np.int64)])
        labels.append(torch.from_numpy(samples.mlm_labels[row, slot].astype(np.int64)))
        if "seq_relationship_logits" in output:
            truth = torch.from_numpy(samples.nsp_labels.astype(np.int64))
            nsp.append(F.cross_entropy(output.seq_relationship_logits, truth, reduction="none"))
    logits, labels = torch.cat(logits), torch.cat(labels)
    found = {"mlm_loss": F.cross_entropy(logits, labels), "mlm_accuracy": (logits.argmax(1) == labels).float().mean()}
    return {
        name: value.item() for name, value in {**found, **({"nsp_loss": torch.cat(nsp).mean()} if nsp else {})}.items()
    }


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_it_gives_transformers_losses_on_the_same_samples_whole_or_in_shards(tmp_path, shards, kind, capsys):
    model, words = save(kind, tmp_path, shards)
    assert main([*words, "--json"]) == 0
    found, expected = json.loads(capsys.readouterr().out), losses_of(model, shards)
    assert found["samples"] == 100 and ("nsp_loss" in found) == (kind is BertForPreTraining)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["perplexity"] == pytest.approx(np.exp(expected["mlm_loss"]), rel=1e-4)
    assert found["loss"] == pytest.approx(expected["mlm_loss"] + expected.get("nsp_loss", 0), abs=2e-4)
    folder = tmp_path / "model"
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "shard.safetensors")
    (folder / "training_state.json").write_text('{"shards": ["weights/shard.safetensors"]}')
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main([*words, "--batch-size", "7"]) == 0
    assert f"mlm loss        {found['mlm_loss']:.4f}" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_said(tmp_path, shards, capsys):
    _, words = save(BertModel, tmp_path, shards)
    assert main(words) == 2
    assert "has no MLM head" in capsys.readouterr().err
    vocab = tmp_path / "model" / "vocab.txt"
    vocab.write_text(vocab.read_text().replace("word7\n", "sword\n"))
    assert main(words) == 2
    assert "vocab.txt: is not the vocabulary that" in capsys.readouterr().err
    assert main(["gone", *words[1:]]) == 2
    assert "gone: no such folder" in capsys.readouterr().err


def test_help_teaches_by_an_example_and_comes_without_importing_torch():
    code = "import sys, bert.evaluate; sys.exit('torch' in sys.modules)"
    assert_help_teaches("bert.evaluate", "python -m bert.evaluate runs/", code)
