"""`--part K/N` on many machines, then `--finish N`: what one machine makes, byte for byte."""

import glob
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import prepare as module
from data.errors import InputError
from data.prepare import PrepareOptions, main, make_part, make_vocab, prepare
from data.preparing import splits
from data.preparing.shares import is_share
from tests import ROOT
from tests.data.test_prepare import SIZES, arguments, corpus, file_hashes, make, small_chunks, stop_at


def part(corpus, output, name, **options):
    given = {"input": [str(corpus / "*.txt")], "vocab": str(corpus / "vocab"), "workers": 1, **SIZES, **options}
    return make_part(PrepareOptions(output=str(output), part=name, **given), progress=False)


def random_corpus(folder, draw):
    folder.mkdir()
    words = [f"w{number}" for number in range(30)]
    for file in range(draw.randint(1, 3)):
        texts = [
            "\n".join(
                " ".join(draw.choice(words) for _ in range(draw.randint(1, 40))) for _ in range(draw.randint(1, 9))
            )
            for _ in range(draw.randint(2, 12))
        ]
        (folder / f"{file}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "vocab").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[3:]]))
    return folder


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_parts_in_any_order_give_the_bytes_of_one_machine(tmp_path_factory, seed):
    folder, draw = tmp_path_factory.mktemp("parts"), random.Random(seed)
    text, count = random_corpus(folder / "text", draw), draw.randint(1, 6)
    options = dict(
        duplicates=draw.randint(1, 2), nsp=draw.random() < 0.7, seed=draw.randint(0, 9), samples_per_shard=20
    )
    if draw.random() < 0.5:
        options.update(held_out=0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "CHUNK_CHARACTERS", draw.choice([300, 1500, 20000]))
        patch.setattr(module, "GROUP_CHUNKS", draw.randint(1, 5))
        whole = make(text, folder / "whole", workers=1, **options)
        parts = [f"{number}/{count}" for number in range(1, count + 1)]
        draw.shuffle(parts)
        for name in parts:
            if draw.random() < 0.3:
                with pytest.MonkeyPatch.context() as stopping, pytest.raises(KeyboardInterrupt):
                    stop_at(stopping, draw.randint(1, 2), KeyboardInterrupt())
                    part(text, folder / "out", name, **options)
                    raise KeyboardInterrupt  # there was no more to do
            part(text, folder / "out", name, **options)
        part(text, folder / "out", parts[0], **options)  # whole already
        joined = make(text, folder / "out", finish=count, workers=1, **options)
    assert file_hashes(folder / "out") == file_hashes(folder / "whole")
    assert sorted(os.listdir(folder / "out")) == sorted(os.listdir(folder / "whole"))
    assert str(joined).replace(str(folder / "out"), str(folder / "whole")) == str(whole)


def test_with_processes_and_a_vocabulary_trained_first_parts_give_the_bytes_of_one_machine(
    corpus, tmp_path, small_chunks
):
    given = dict(input=[str(corpus / "*.txt")], **SIZES)
    prepare(PrepareOptions(output=str(tmp_path / "whole"), vocab_size=150, workers=2, **given), progress=False)
    out = str(tmp_path / "out")
    make_vocab(PrepareOptions(output=out, vocab_size=150, vocab_only=True, **given), progress=False)
    options = dict(vocab=os.path.join(out, "vocab.txt"), workers=2)
    for name in ("2/2", "1/2"):
        part(corpus, out, name, **options)
    make(corpus, out, finish=2, **options)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


KILLED = """
import json, os, signal, sys
from data import prepare as module
from data.preparing import splits
splits.CHUNK_CHARACTERS, module.GROUP_CHUNKS = 2000, 3
last, calls, real = int(sys.argv[1]), [], module.InlineWorker.submit
def submit(pool, task):
    calls.append(task)
    if len(calls) > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(pool, task)
module.InlineWorker.submit = submit
sys.exit(module.main(sys.argv[2:]))
"""


def test_killed_parts_and_a_killed_finish_go_on_and_nothing_is_taken_for_whole(corpus, tmp_path, small_chunks):
    make(corpus, tmp_path / "whole", samples_per_shard=40)
    command = arguments(corpus, tmp_path / "out", "--samples-per-shard", "40", "--workers", "1")

    def killed(tasks, *more):
        run = subprocess.run([sys.executable, "-c", KILLED, str(tasks), *command, *more], cwd=ROOT)
        return run.returncode == -signal.SIGKILL

    assert main([*command, "--part", "1/2"]) == 0
    assert killed(2, "--part", "2/2")
    with pytest.raises(
        InputError, match=r"out: 1 of 2 parts are missing: part-2-of-2; found .part-2-of-2.unfinished, "
    ):
        make(corpus, tmp_path / "out", finish=2, samples_per_shard=40)
    done = glob.glob(str(tmp_path / "out" / ".part-2-of-2.unfinished" / "data" / "chunk-*.h5"))
    before = {path: os.stat(path).st_mtime_ns for path in done}
    assert len(before) == 2
    assert main([*command, "--part", "2/2"]) == 0
    for path, made in before.items():  # not made again
        assert os.stat(path.replace(".part-2-of-2.unfinished/data", "part-2-of-2")).st_mtime_ns == made
    assert killed(3, "--finish", "2") and not glob.glob(str(tmp_path / "out" / "*.h5"))
    assert main([*command, "--finish", "2"]) == 0
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize("when", ["while files move", "while parts are removed"])
def test_a_finish_killed_as_it_ends_ends_when_it_is_given_again(corpus, tmp_path, monkeypatch, when):
    make(corpus, tmp_path / "whole")
    for name in ("1/2", "2/2"):
        part(corpus, tmp_path / "out", name)
    with monkeypatch.context() as patch:
        if when == "while files move":
            real = os.replace

            def replace(source, target):
                if target.endswith("out/vocab.txt"):
                    raise KeyboardInterrupt
                real(source, target)

            patch.setattr(os, "replace", replace)
        else:

            def remove_one(output, count):
                os.rename(os.path.join(output, "part-1-of-2"), str(tmp_path / "gone"))
                raise KeyboardInterrupt

            patch.setattr(module, "remove_shares", remove_one)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "out", finish=2)
    assert make(corpus, tmp_path / "out", finish=2).documents == 40
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_part_does_a_share_of_the_tokenizing_and_the_finish_none_of_it(corpus, tmp_path, small_chunks, monkeypatch):
    done = []
    real = module.InlineWorker.submit
    monkeypatch.setattr(module.InlineWorker, "submit", lambda self, task: done.append(task["do"]) or real(self, task))
    make(corpus, tmp_path / "whole", workers=1)
    chunks = done.count("make_part")
    assert chunks > 6
    for number in range(1, 5):
        done.clear()
        part(corpus, tmp_path / "out", f"{number}/4")
        assert done == ["make_part"] * len(range(number - 1, chunks, 4))
    done.clear()
    make(corpus, tmp_path / "out", finish=4, workers=1)
    assert set(done) == {"make_shard"}


def test_parts_of_other_options_or_another_text_are_refused_and_named(corpus, tmp_path, small_chunks):
    out = tmp_path / "out"
    for name in ("1/3", "2/3"):
        part(corpus, out, name)
    part(corpus, out, "3/3", seed=7)
    with pytest.raises(
        InputError, match=r"part-3-of-3.share.json: made with seed 7, not 42. .*remove .*part-3-of-3 and"
    ):
        make(corpus, out, finish=3)
    with pytest.raises(InputError, match=r"part-3-of-3.share.json: made with seed 7, not 42"):
        part(corpus, out, "3/3")
    (out / "part-3-of-3").rename(tmp_path / "other")
    other = tmp_path / "text"  # the same names and sizes
    other.mkdir()
    for path in corpus.glob("*.txt"):
        (other / path.name).write_text(path.read_text().replace("d31w1 ", "d31w2 "))
    part(corpus, out, "3/3", input=[str(other / "*.txt")])
    with pytest.raises(
        InputError, match=r"part-3-of-3: made of another text than part-1-of-3: .* first to differ is \d"
    ):
        make(corpus, out, finish=3)
    assert sorted(os.listdir(out)) == ["part-1-of-3", "part-2-of-3", "part-3-of-3"]  # nothing was lost, nothing made
    (out / "part-3-of-3").rename(tmp_path / "third")
    part(corpus, out, "3/3")
    next((out / "part-2-of-3").glob("chunk-00000001-*")).unlink()
    with pytest.raises(InputError, match=r"part-2-of-3.chunk-00000001-.*is missing; remove the folder"):
        make(corpus, out, finish=3)


def test_a_part_that_goes_on_does_not_take_what_was_made_of_another_text(corpus, tmp_path, small_chunks):
    text = tmp_path / "text"
    text.mkdir()
    for path in corpus.glob("*.txt"):
        (text / path.name).write_text(path.read_text().replace("d1w1 ", "d1w2 "))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1, KeyboardInterrupt())
        part(corpus, tmp_path / "out", "1/1", input=[str(text / "*.txt")])
    part(corpus, tmp_path / "out", "1/1")
    make(corpus, tmp_path / "out", finish=1)
    make(corpus, tmp_path / "whole")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--part", "0/16"], "--part is 0/16, expected K/N with K from 1 to N, such as 3/16"),
        (["--part", "17/16"], "--part is 17/16, expected K/N"),
        (["--part", "3"], "--part is 3, expected K/N"),
        (["--finish", "0"], "--finish is 0, expected the number of parts, 1 or more"),
        (["--finish", "2", "--part", "1/2"], "--part and --finish are given, expected one of them"),
        (["--vocab-only"], "--vocab-only and --vocab are given, expected one of them"),
        (
            ["--finish", "2"],
            "out: 2 of 2 parts are missing: part-1-of-2, part-2-of-2; found none. .* such as --part 1/2",
        ),
    ],
)
def test_wrong_use_is_named_and_nothing_is_written(corpus, tmp_path, capsys, more, message):
    assert main(arguments(corpus, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not os.listdir(tmp_path)


def test_parts_need_a_vocabulary_and_the_error_says_how_to_get_one(corpus, tmp_path):
    with pytest.raises(InputError, match="--part needs --vocab: .*--vocab-only .* and give --vocab .*vocab.txt"):
        part(corpus, tmp_path / "out", "1/2", vocab=None)


def test_a_data_set_that_is_finished_takes_no_part_and_no_second_finish(corpus, tmp_path):
    part(corpus, tmp_path / "out", "1/1")
    make(corpus, tmp_path / "out", finish=1)
    before = file_hashes(tmp_path / "out")
    for again in (lambda: part(corpus, tmp_path / "out", "1/1"), lambda: make(corpus, tmp_path / "out", finish=1)):
        with pytest.raises(InputError, match="out: holds a data set already .train-00000.h5.; nothing is overwritten"):
            again()
    assert file_hashes(tmp_path / "out") == before


def test_the_command_says_what_a_part_made_and_what_follows(corpus, tmp_path, capsys):
    command = arguments(corpus, tmp_path / "out", "--part", "2/2")
    assert main(command) == 0
    assert "2/2, 0 of 1 chunks" in capsys.readouterr().out
    assert main(command) == 0
    assert "2/2 is there already, made with these options" in capsys.readouterr().out
    assert is_share("16/16") and not is_share("-1/2") and not is_share("1/2/3")
