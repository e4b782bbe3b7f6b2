"""What cannot be used is one clear error before the first step, and nothing is overwritten."""

import os

import h5py
import pytest
import torch

from run_pretraining import main
from tests.bert.run.runs import VOCAB, arguments, checkpoints, make_shards, start, wait_for


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def bad_inputs():
    yield "no files at the top", {"data__files": "x-*.h5"}, ["x-*.h5", "--output shards/", "--vocab-size 120"]
    yield (
        "both sets",
        {"data__held_out_files": "{shards}/train-00001.h5"},
        ["train-00001.h5", "data.files and by data.held_out_files"],
    )
    yield "no held-out file", {"data__held_out_files": "gone.h5"}, ["gone.h5", "no such file"]
    yield "output is a file", {"training__output": "{shards}/vocab.txt"}, ["training.output", "is a file"]
    yield (
        "no files",
        {"data__files": "nowhere/train-*.h5"},
        ["nowhere/train-*.h5", "python -m data.prepare", "--sequence-length 32"],
    )
    yield "other length", {"data__sequence_length": 16}, ["train-00000.h5", "sequence length 32", "16"]
    yield "small vocabulary", {"model__vocab_size": 100}, ["train-00000.h5", "120", "model.vocab_size is 100"]
    yield "no vocabulary", {"data__vocab": "gone.txt"}, ["gone.txt", "--data.vocab"]
    yield "no start", {"training__start_from": "gone"}, ["gone", "no such folder"]
    yield "no cuda", {"device": "cuda"}, ["CUDA", "--device auto"]


@pytest.mark.parametrize(
    "name, changes, words", list(bad_inputs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_one_clear_error_before_the_first_step(tmp_path, shards, capsys, name, changes, words):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert (
        main(arguments(tmp_path, shards, **{key: str(value).format(shards=shards) for key, value in changes.items()}))
        == 2
    )
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def damaged_shards():
    def cut_off(path):
        path.write_bytes(path.read_bytes()[:-1000])

    def no_data_set(path):
        with h5py.File(path, "a") as file:
            del file["nsp_labels"]

    def beyond_the_vocabulary(path):
        with h5py.File(path, "a") as file:
            file["input_ids"][5, 1] = VOCAB

    yield cut_off, ["train-00001.h5", "cut off"]
    yield no_data_set, ["train-00001.h5", "nsp_labels", "missing"]
    yield beyond_the_vocabulary, ["train-00001.h5", "sample 5", "120"]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("damage, words", list(damaged_shards()))
def test_a_damaged_shard_is_named_before_the_first_step_and_nothing_is_written(
    tmp_path, shards, capsys, damage, words, held_out
):
    damage(shards / "train-00001.h5")
    changes = (
        {"data__files": shards / "train-00000.h5", "data__held_out_files": shards / "train-00001.h5"}
        if held_out
        else {}
    )
    assert main(arguments(tmp_path, shards, **changes)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_what_a_folder_holds_that_is_no_run_is_left_alone(tmp_path, shards, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("not ours\n")
    for resume in ("never", "auto"):
        assert main(arguments(tmp_path, shards, resume=resume)) == 2
        assert "metrics.jsonl but no run.json" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def test_a_broken_run_json_and_a_broken_checkpoint_are_named(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=2)) == 0
    moments = os.path.join(checkpoints(tmp_path)[-1], "optimizer.safetensors")
    os.remove(moments)
    assert main(arguments(tmp_path, shards, resume="auto")) == 2
    message = capsys.readouterr().err
    assert moments in message and "continue from the checkpoint before" in message
    (tmp_path / "run" / "run.json").write_text('{"model')
    assert main(arguments(tmp_path, shards, resume="auto")) == 2
    assert "run.json: cannot be read as JSON" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(tmp_path, shards, capsys):
    process = start(arguments(tmp_path, shards, training__max_steps=100000))
    wait_for(process, "step 1/")
    assert main(arguments(tmp_path, shards, training__max_steps=100000, resume="auto")) == 2
    assert "another process" in capsys.readouterr().err
    process.terminate()
    process.communicate()


def test_a_start_with_another_vocabulary_is_refused(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards, training__stop_at_step=1)) == 0
    vocab = os.path.join(checkpoints(tmp_path)[-1], "vocab.txt")
    with open(vocab) as file:
        text = file.read()
    with open(vocab, "w") as file:
        file.write(text.replace("word7\n", "sword\n"))
    assert (
        main(
            arguments(
                tmp_path, shards, training__output=tmp_path / "two", training__start_from=checkpoints(tmp_path)[-1]
            )
        )
        == 2
    )
    assert vocab in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_another_vocabulary_than_the_shards_is_refused(tmp_path, shards, capsys):
    words = (shards / "vocab.txt").read_text().replace("word7\n", "sword\n")
    (tmp_path / "other.txt").write_text(words)
    assert main(arguments(tmp_path, shards, data__vocab=tmp_path / "other.txt")) == 2
    assert "other.txt" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, shards, capsys):
    assert main(arguments(tmp_path, shards)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(arguments(tmp_path, shards)) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(arguments(tmp_path, shards, resume="auto", optimizer__learning_rate=0.5)) == 2
    message = capsys.readouterr().err
    assert "run.json" in message and "optimizer.learning_rate is 0.01" in message and "0.5" in message
    (tmp_path / "more").mkdir()
    other = make_shards(tmp_path / "more" / "shards", samples=120)
    assert main(arguments(tmp_path, other, resume="auto")) == 2
    assert "another data set" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_shard_that_vanishes_stops_the_run_with_its_name_and_a_checkpoint(tmp_path, shards):
    process = start(arguments(tmp_path, shards, training__max_steps=100000, training__log_every=1))
    wait_for(process, "step 2/")
    (shards / "train-00001.h5").unlink()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "train-00001.h5" in errors and "Traceback" not in errors
    assert checkpoints(tmp_path)


def test_shards_of_another_text_are_not_taken_for_those_of_this_one(tmp_path, capsys):
    texts = {"a": "One sentence here.\nAnother one there.\n\nA third.\nAnd a fourth one.\n"}
    texts["b"] = texts["a"].upper()
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text * 30)

    def run(name):
        words = ["--data.text", str(tmp_path / f"{name}.txt"), "--data.files", str(tmp_path / "shards/train-*.h5")]
        words += ["--data.held_out", "0", "--data.held_out_files", "[]", "--data.duplicates", "1"]
        words += ["--training.output", str(tmp_path / f"run-{name}"), "--training.max_steps", "1"]
        return main(["--config", "quickstart.json", "--device", "cpu", *words])

    assert run("a") == 0
    assert run("b") == 2
    assert "was made of a.txt, and data.text names b.txt" in capsys.readouterr().err
