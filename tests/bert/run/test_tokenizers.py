"""A run's shards, held-out shards, weights and checkpoints are of text that was tokenized alike."""

import json
import os
import shutil

import h5py
import pytest

from data.tokenizer import SPECIAL_TOKENS, Vocabulary, read_vocab, vocab_sha256, write_tokenizer_files
from run_pretraining import main
from tests.bert.run.runs import arguments, checkpoints, make_shards


def make_cased(folder, samples=100):
    """The shards of `make_shards`, of text that was cased."""
    make_shards(folder, samples)
    cased = Vocabulary(read_vocab(str(folder)).tokens, lowercase=False)
    for path in folder.glob("*.h5"):
        with h5py.File(str(path), "a") as file:
            file.attrs["tokenizer"] = cased.rules
    write_tokenizer_files(str(folder), cased)
    return folder


def edited(path, change):
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def test_text_that_was_tokenized_otherwise_is_refused_wherever_it_comes_in(tmp_path, capsys):
    shards, lower = make_cased(tmp_path / "shards"), make_shards(tmp_path / "lower")

    def refused(words, **changes):
        assert main(arguments(tmp_path, shards, **changes)) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
        assert not (tmp_path / "run").exists()

    lower_case, mixed = json.dumps([f"{lower}/*.h5"]), json.dumps([f"{lower}/train-00000.h5", f"{shards}/*1.h5"])
    refused(
        ["shards/train-00000.h5 says cased", "lower/train-00000.h5 says lower-case"], data__held_out_files=lower_case
    )
    refused(["its tokenizer is", '"lowercase": true', "Train on shards of one data set"], data__files=mixed)
    refused(["data.lowercase true says lower-case", "train-00000.h5 says cased"], data__lowercase="true")
    write_tokenizer_files(str(lower), read_vocab(str(lower)))
    refused(["train-00000.h5 says cased", "lower/tokenizer_config.json (do_lower_case) says"], data__vocab=lower)
    # A bare vocab.txt does not say, so the shards do.
    shutil.copy(str(shards / "vocab.txt"), str(tmp_path / "bare.txt"))
    assert main(arguments(tmp_path, shards, data__vocab=tmp_path / "bare.txt", training__stop_at_step=1)) == 0
    checkpoint = checkpoints(tmp_path)[-1]
    config = json.loads((tmp_path / checkpoint / "tokenizer_config.json").read_text())
    assert config["do_lower_case"] is False and not read_vocab(checkpoint).lowercase
    other = {"training__output": tmp_path / "other", "training__start_from": checkpoint, "training__stop_at_step": 1}
    assert main(arguments(tmp_path, lower, **other)) == 2
    message = capsys.readouterr().err
    assert "tokenizer_config.json (do_lower_case) says cased" in message and f"prepare --vocab {checkpoint}" in message
    assert not (tmp_path / "other").exists() and main(arguments(tmp_path, shards, **other)) == 0


def test_a_run_of_before_shards_and_checkpoints_told_the_tokenizer_goes_on(tmp_path, capsys):
    shards = make_shards(tmp_path / "shards")
    for path in shards.glob("*.h5"):
        with h5py.File(str(path), "a") as file:
            del file.attrs["tokenizer"]
    assert main(arguments(tmp_path, shards, training__stop_at_step=2)) == 0
    state = tmp_path / checkpoints(tmp_path)[-1] / "training_state.json"
    edited(state, lambda it: it["data_set"].pop("tokenizer"))
    edited(state, lambda it: [it["config"]["data"].pop(name) for name in ("lowercase", "normalization")])
    assert main(arguments(tmp_path, shards, resume="auto", training__stop_at_step=4)) == 0
    make_cased(tmp_path / "cased")
    assert main(arguments(tmp_path, tmp_path / "cased", resume="auto")) == 2
    assert (
        "was trained on text that is lower-case, accents stripped; that of the shards is cased"
        in capsys.readouterr().err
    )


def test_a_checkpoint_says_the_id_of_padding(tmp_path):
    shards = make_shards(tmp_path / "shards")
    tokens = read_vocab(str(shards)).tokens
    tokens[0], tokens[50] = tokens[50], tokens[0]
    write_tokenizer_files(str(shards), Vocabulary(tokens))
    for path in shards.glob("*.h5"):
        with h5py.File(str(path), "a") as file:
            file.attrs["vocab_sha256"] = vocab_sha256(tokens)
    assert main(arguments(tmp_path, shards, training__stop_at_step=1)) == 0
    with open(os.path.join(checkpoints(tmp_path)[-1], "config.json")) as file:
        assert json.load(file)["pad_token_id"] == 50


def test_a_cased_vocabulary_for_text_is_refused_with_the_setting_to_add(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "Geldi", "Then", "sat"]))
    (tmp_path / "text.txt").write_text("Then Geldi sat\n")
    changes = {"data__files": tmp_path / "made" / "train-*.h5", "data__text": tmp_path / "text.txt"}
    assert main(arguments(tmp_path, tmp_path, data__vocab=tmp_path / "vocab.txt", **changes)) == 2
    advice = "Add --data.lowercase false, which suits them, or --data.lowercase true to do it all the same"
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("lowercase", ["true", "false"])
def test_shards_made_from_text_are_normalised_as_the_config_says(tmp_path, lowercase):
    (tmp_path / "text.txt").write_text("\n".join(["Çağrı ağaç ÖĞÜT şimdi Geldi", "Then The CAT sat Down", ""] * 60))
    changes = {
        "data__files": tmp_path / "made" / "train-*.h5",
        "data__text": tmp_path / "text.txt",
        "data__lowercase": lowercase,
        "data__strip_accents": "false",
        "data__normalization": "nfc",
        "training__stop_at_step": 1,
    }
    assert main(arguments(tmp_path, tmp_path, **changes)) == 0
    vocabulary = read_vocab(checkpoints(tmp_path)[-1])
    assert (str(vocabulary.lowercase).lower(), vocabulary.normalization) == (lowercase, "nfc")
    assert ("Çağrı" in vocabulary.tokens) == (lowercase == "false") and not vocabulary.strips_accents
