"""`python -m bert.fill_mask`: transformers' probabilities of the same tokens, of every kind of folder."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from bert.fill_mask import main
from data.tokenizer import Vocabulary, write_tokenizer_files
from tests import assert_help_teaches
from tests.bert.run.runs import LENGTH
from tests.bert.run.test_checkpoint import WORDS

TEXTS = ["Hello [MASK]!", "[MASK] worlds, word3 [MASK][MASK] word9"]


def save(kind, folder, seed=0, **settings):
    """A random model whose vocabulary has fewer tokens than it has ids."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.5
    )
    config = BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=LENGTH, **sizes, **settings)
    model = kind(config).eval()
    model.save_pretrained(folder)
    write_tokenizer_files(str(folder), Vocabulary(WORDS.tokens), LENGTH)
    return model


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
def test_it_gives_transformers_probabilities_whole_or_in_shards(tmp_path, kind, capsys):
    model, tokenizer = save(kind, tmp_path, seed=len(kind.__name__)), AutoTokenizer.from_pretrained(tmp_path)
    words = [str(tmp_path), *TEXTS, "--top-k", "7", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [text["text"] for text in found] == TEXTS and [len(text["masks"]) for text in found] == [1, 3]
    for text in found:
        inputs = tokenizer(text["text"], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        logits = output.logits if kind is BertForMaskedLM else output.prediction_logits
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        assert places == [mask["position"] for mask in text["masks"]]
        for mask in text["masks"]:
            best = logits[0, mask["position"]].softmax(-1)[: len(WORDS)].topk(7)
            assert [token["token_id"] for token in mask["tokens"]] == best.indices.tolist()
            assert [token["token"] for token in mask["tokens"]] == tokenizer.convert_ids_to_tokens(best.indices)
            assert [token["probability"] for token in mask["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "shard.safetensors")
    (tmp_path / "training_state.json").write_text('{"shards": ["weights/shard.safetensors"]}')
    assert main(words) == 0 and json.loads(capsys.readouterr().out) == found
    assert main(words[:-3]) == 0
    first = found[0]["masks"][0]["tokens"][0]
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == TEXTS[0] and lines[1].split()[0] == f"{100 * first['probability']:.1f}"
    assert lines[1].endswith(first["token"]) and len(lines) == 1 + 5 + 1 + 3 * (1 + 5) + 1
    assert lines[1].count("█") == int(round(8 * 30 * first["probability"]) / 8)


def test_what_cannot_be_filled_is_said(tmp_path, capsys):
    def fault(*words):
        assert main([str(tmp_path), *words]) == 2
        return capsys.readouterr().err

    save(BertForMaskedLM, tmp_path)
    assert "'Hello!': has no [MASK]" in fault("[MASK]", "Hello!")
    assert f"has 42 tokens, with [CLS] and [SEP], and {tmp_path} has 32 positions" in fault("[MASK] " * 40)
    assert "--top-k is 0, expected 1 or more" in fault("[MASK]", "--top-k", "0")
    write_tokenizer_files(str(tmp_path), Vocabulary([*WORDS.tokens, *"abcdefg"]), LENGTH)
    assert f"its vocabulary has {len(WORDS) + 7} tokens, and its model {len(WORDS) + 5}" in fault("[MASK]")
    save(BertForMaskedLM, tmp_path, tie_word_embeddings=False)
    assert "config.json: tie_word_embeddings is false" in fault("[MASK]")
    save(BertModel, tmp_path)
    assert "has no MLM head" in fault("[MASK]")


def test_help_teaches_by_an_example_and_comes_without_importing_torch():
    code = "import sys, bert.fill_mask; sys.exit('torch' in sys.modules)"
    assert_help_teaches("bert.fill_mask", "python -m bert.fill_mask runs/", code)
