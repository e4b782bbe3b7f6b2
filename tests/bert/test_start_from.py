"""Runs that start from a BERT folder: whose defaults they take, what must agree with it, and how old ones go on."""

import json
import os

import pytest
import torch
from transformers import BertConfig, BertModel

from bert.command_line import parse_command_line
from bert.run.checkpoint import read_safetensors
from data.errors import InputError
from data.shards import open_shard
from data.tokenizer import SPECIAL_TOKENS
from run_pretraining import main
from tests.bert.run.runs import checkpoints

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
WORDS = [*SPECIAL_TOKENS, *(f"{first}{second}" for first in "abcde" for second in "fghijklmnop")]


@pytest.fixture
def folder(tmp_path):
    """A bare BERT of transformers."""
    torch.manual_seed(1)
    config = BertConfig(**SIZES, max_position_embeddings=40, layer_norm_eps=1e-6, hidden_dropout_prob=0.3)
    BertModel(config).save_pretrained(tmp_path / "their")
    (tmp_path / "their" / "vocab.txt").write_text("".join(word + "\n" for word in WORDS))
    return tmp_path / "their"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def parsed(*options, **values):
    return parse_command_line([*options, *(f"--{key.replace('__', '.')}={value}" for key, value in values.items())])


def test_one_flag_takes_the_model_of_the_folder_and_the_optimizer_of_adaptation(folder):
    config = parsed("--training.start_from", str(folder))
    model, optimizer = config.model, config.optimizer
    assert {key: getattr(model, key) for key in SIZES} == SIZES
    assert (model.layer_norm_eps, model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (1e-6, 0.3, 0.1)
    assert (model.max_position_embeddings, config.data.sequence_length) == (40, 40)
    assert (optimizer.name, optimizer.learning_rate, optimizer.max_grad_norm) == ("adamw", 5e-5, 1.0)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.warmup_ratio) == ([0.9, 0.999], 0.01, 0.1)
    assert (optimizer.schedule, config.training.global_batch_size) == ("linear", 32)


def test_what_is_said_wins_over_each_of_these_defaults_and_a_said_lamb_has_its_own(folder):
    start = {"training__start_from": folder, "model__hidden_dropout_prob": 0, "model__hidden_size": 32}
    config = parsed(**start, optimizer__learning_rate=1e-3, data__sequence_length=24)
    assert (config.model.hidden_dropout_prob, config.data.sequence_length) == (0, 24)
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.max_grad_norm) == ("adamw", 1e-3, 1)
    config = parsed(**start, optimizer__name="lamb")
    assert config.optimizer == parsed().optimizer and config.training.global_batch_size == 65536


@pytest.mark.parametrize("name", ["gpu_phase2", "pod16_phase2", "large_pod4_phase2_packed"])
def test_the_recipes_second_phase_says_all_that_it_relies_on(name, folder):
    config = parsed(config=name)
    edit(folder / "config.json", **vars(config.model))
    start = parsed(config=name, training__start_from=folder)
    assert (start.model, start.optimizer, start.data) == (config.model, config.optimizer, config.data)
    assert start.training.global_batch_size == config.training.global_batch_size


def test_another_model_than_the_folders_is_an_error_with_the_way_out(folder, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"model": {"hidden_size": 64, "num_hidden_layers": 2}, "training": {"seed": 3}}))
    options = ["--config", str(own), "--training.start_from", str(folder), "--model.layer_norm_eps", "1e-12"]
    with pytest.raises(InputError) as error:
        parse_command_line(options)
    message, place = str(error.value), os.path.join(folder, "config.json")
    assert message.startswith(f"{own}: model.hidden_size is 64, model.layer_norm_eps is 1e-12, but {place}, which")
    remedy = "--model.hidden_size 32 --model.layer_norm_eps 1e-06"
    assert message.endswith(remedy) and parse_command_line([*options[:4], *remedy.split()]).model.hidden_size == 32
    with pytest.raises(InputError, match="^command line: model.vocab_size is 61, but"):
        parsed(training__start_from=folder, model__vocab_size=61)


def test_what_a_config_json_leaves_out_is_berts_default(folder):
    (folder / "config.json").write_text('{"hidden_size": 36, "intermediate_size": 40}')
    model = parsed(training__start_from=folder).model
    assert (model.hidden_size, model.num_hidden_layers, model.layer_norm_eps) == (36, 12, 1e-12)
    edit(folder / "config.json", hidden_size="36")
    with pytest.raises(InputError, match='config.json: hidden_size is "36", expected a number'):
        parsed(training__start_from=folder)


@pytest.mark.parametrize(
    "key, value",
    [("hidden_act", "relu"), ("position_embedding_type", "relative_key"), ("model_type", "roberta")]
    + [("is_decoder", True), ("tie_word_embeddings", False)],
)
def test_a_model_of_another_kind_is_refused_before_shards_are_made(key, value, folder, tmp_path, capsys):
    edit(folder / "config.json", **{key: value})
    (tmp_path / "own.txt").write_text("af ag\n")
    options = ["--device=cpu", f"--training.start_from={folder}", f"--training.output={tmp_path / 'run'}"]
    assert main([*options, f"--data.text={tmp_path / 'own.txt'}"]) == 2
    assert f"config.json: {key} is {value!r}, expected" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_text_alone_adapts_a_folder_with_its_vocabulary_and_the_run_goes_on_without_it(folder, tmp_path, capsys):
    lines = [" ".join(WORDS[5 + (i * j) % 55] for j in range(1, 9)) for i in range(160)]
    (tmp_path / "own.txt").write_text("\n\n".join(lines))
    options = ["--device=cpu", f"--training.start_from={folder}", f"--data.text={tmp_path / 'own.txt'}"]
    options += [f"--training.output={tmp_path / 'run'}", "--training.max_steps=2", "--training.compile=off"]
    options += ["--training.global_batch_size=8", "--data.held_out=0.1", "--data.mask_tokens=4"]
    assert main([*options, "--training.stop_at_step=1"]) == 0
    said = capsys.readouterr().out
    assert f"starts from {folder}" in said
    assert "starts from a folder: optimizer.name adamw, optimizer.learning_rate 5e-05" in said
    assert "global_batch_size" not in said
    shard = open_shard(str(tmp_path / "run" / "data" / "train-00000.h5"))
    assert shard.vocab_size == len(WORDS) and shard.sequence_length == 40
    assert (tmp_path / "run" / "data" / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    name = "bert.encoder.layer.1.output.dense.weight"
    before = read_safetensors(str(folder / "model.safetensors"))[name[len("bert.") :]]
    after = read_safetensors(os.path.join(checkpoints(tmp_path)[-1], "model.safetensors"))[name]
    assert 0 < (after - before).norm() < 0.01 * before.norm()
    folder.rename(tmp_path / "gone")
    assert main([*options, "--resume=auto"]) == 0
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["step"] == 2


def test_a_run_from_before_these_defaults_goes_on_as_it_was(folder, tmp_path):
    (tmp_path / "run").mkdir()
    old = {"optimizer.name": "lamb", "optimizer.learning_rate": 0.01, "optimizer.warmup_ratio": 0.28}
    old.update({"model.hidden_size": 36, "training.global_batch_size": 64, "model.layer_norm_eps": 1e-12})
    (tmp_path / "run" / "run.json").write_text(json.dumps({**old, "some.other": 1}))
    options = dict(training__start_from=folder, training__output=tmp_path / "run", optimizer__learning_rate=0.01)
    config = parsed(**options, resume="auto")
    assert (config.optimizer.name, config.optimizer.max_grad_norm, config.training.global_batch_size) == ("lamb", 0, 64)
    assert config.model.layer_norm_eps == 1e-12
