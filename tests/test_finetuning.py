"""run_finetuning.py as people use it: one task, seeds beside random weights, all of GLUE, and input that cannot be
used."""

import json
import os
import random
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from bert.config import Config, ModelConfig
from bert.evaluate import EvaluateOptions, evaluate
from bert.model.model import initialize
from bert.run.checkpoint import transformers_config
from bert.tasks import make_model, make_task
from data.tokenizer import Vocabulary, write_tokenizer_files
from run_finetuning import main
from tests import ROOT
from tests.bert.engines.parallel.started import environment

GOOD, BAD, OTHERS = (
    ("good", "fine", "great"),
    ("bad", "poor", "awful"),
    ("the", "a", "film", "plot", "is", "was", "and"),
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHERS]
TINY = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT folder with an encoder of random weights."""
    folder = tmp_path_factory.mktemp("bert")
    config = Config(model=ModelConfig(vocab_size=len(WORDS), **TINY))
    task = make_task(config)
    model = make_model(config, task)
    initialize(model, 0.05, 1)
    described = transformers_config(config.model, model.architecture, task.architecture)
    (folder / "config.json").write_text(json.dumps(described))
    save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, folder / "model.safetensors")
    write_tokenizer_files(str(folder), Vocabulary(WORDS))
    return str(folder)


def sentences(count, seed):
    """(sentence, whether it is good) each."""
    rng = random.Random(seed)
    for _ in range(count):
        good = rng.random() < 0.5
        words = rng.choices(OTHERS, k=rng.randint(1, 9)) + [rng.choice(GOOD if good else BAD)]
        rng.shuffle(words)
        yield " ".join(words), int(good)


def write_table(path, header, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.writelines("\t".join(map(str, row)) + "\n" for row in ([header] if header else []) + rows)
    return str(path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train.tsv", 160, 0), ("dev.tsv", 50, 1)):
        write_table(folder / name, ["sentence", "label"], list(sentences(count, seed)))
    return ["--data.files", str(folder / "train.tsv"), "--data.held_out_files", str(folder / "dev.tsv")]


def fast(bert, output):
    learning = ["--optimizer.learning_rate", "0.01", "--training.log_every", "5"]
    return ["--model", bert, "--data.sequence_length", "24", "--training.output", str(output), *learning]


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_it_learns_and_leaves_predictions_a_picture_and_the_best_checkpoint(bert, reviews, tmp_path):
    run = tmp_path / "run"
    assert main(["--config", "sst2.json", *reviews, *fast(bert, run), "--training.epochs", "4"]) == 0
    held_out, predictions = lines_of(run / "held_out.jsonl"), lines_of(run / "predictions.jsonl")
    assert [line["step"] for line in held_out] == [5, 10, 15, 20]
    best = max(held_out, key=lambda line: line["accuracy"])
    assert best["accuracy"] > 0.95 and len(predictions) == 50
    assert sum(line["predicted"] == line["label"] for line in predictions) == round(50 * best["accuracy"])
    assert json.loads((run / "checkpoints" / "best.json").read_text())["accuracy"] == best["accuracy"]
    assert (run / "predictions.png").stat().st_size > 1000
    config = json.loads((run / "checkpoints" / "step_00000020" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_a_run_out_of_patience_ends_whole_and_stays_so(bert, reviews, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["--config", "sst2.json", *reviews, *fast(bert, run), "--training.epochs", "20"]
    command += ["--training.patience", "2"]
    assert main(command) == 0
    held_out = lines_of(run / "held_out.jsonl")
    best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
    assert held_out[-1]["step"] == best + 2 * 5 < 100
    assert json.loads((run / "state.json").read_text())["finished"]
    assert main([*command, "--resume", "auto"]) == 0
    assert lines_of(run / "held_out.jsonl") == held_out


def test_seeds_and_random_weights_make_a_table(bert, reviews, tmp_path, capsys):
    run = tmp_path / "both"
    own = [*reviews, *fast(bert, run), "--seeds", "2", "--baseline", "random", "--training.epochs", "1"]
    assert main(["--config", "sst2.json", *own]) == 0
    (row,) = json.loads((run / "results.json").read_text())["runs"]
    assert row["metric"] == "accuracy" and len(row["pre-trained"]) == len(row["random"]) == 2
    *_, header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["metric", "pre-trained", "random", "difference"] and line.startswith("sst2  accuracy")
    seeds = {
        json.loads((run / name / "run.json").read_text())["training.seed"] for name in os.listdir(run) if "seed" in name
    }
    assert seeds == {1984, 1985}


def write_glue(folder):
    """All eight tasks in GLUE's own form, of made-up sentences."""
    both = [(text, good, other) for (text, good), (other, _) in zip(sentences(40, 2), sentences(40, 3))]
    two = ["entailment", "not_entailment"]
    three = ["entailment", "neutral", "contradiction"]
    forms = {
        "CoLA": (None, [("gj04", good, "", text) for text, good, _ in both]),
        "SST-2": (["sentence", "label"], [(text, good) for text, good, _ in both]),
        "MRPC": (
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [(good, 1, 2, text, other) for text, good, other in both],
        ),
        "STS-B": (["sentence1", "sentence2", "score"], [(text, other, 5 * good) for text, good, other in both]),
        "QQP": (["question1", "question2", "is_duplicate"], [(text, other, good) for text, good, other in both]),
        "MNLI": (
            ["sentence1", "sentence2", "gold_label"],
            [(text, other, three[number % 3]) for number, (text, _, other) in enumerate(both)],
        ),
        "QNLI": (["question", "sentence", "label"], [(text, other, two[good]) for text, good, other in both]),
        "RTE": (["sentence1", "sentence2", "label"], [(text, other, two[good]) for text, good, other in both]),
    }
    for name, (header, rows) in forms.items():
        write_table(folder / name / "train.tsv", header, rows)
        write_table(folder / name / f"dev{'_matched' if name == 'MNLI' else ''}.tsv", header, rows[:20])
    return str(folder)


def test_all_of_glue_is_one_command_with_an_average(bert, tmp_path, capsys):
    run = tmp_path / "glue"
    own = ["--task.folder", write_glue(tmp_path / "GLUE"), "--training.epochs", "1"]
    assert main(["--config", "glue.json", *fast(bert, run), *own]) == 0
    rows = json.loads((run / "results.json").read_text())["runs"]
    metrics = {row["config"]: row["metric"] for row in rows}
    assert metrics == {
        **dict.fromkeys(("sst2", "mnli", "qnli", "rte"), "accuracy"),
        **{"cola": "matthews_correlation", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"},
    }
    average = capsys.readouterr().out.splitlines()[-1].split()
    assert average[0] == "average" and float(average[1]) == pytest.approx(
        sum(row["pre-trained"][0] for row in rows) / 8, abs=1e-4
    )


@pytest.mark.parametrize(
    "rows, options, expected",
    [
        ([("text", "label"), ("good film", "x")], [], "1 different values are in the column 'label'"),
        (
            [("text", "label"), ("good film", "x"), ("bad film", "y")],
            ["--task.labels", '["x", "z"]'],
            "row 2: the label is 'y'",
        ),
        (
            [("words", "label"), ("good film", "x"), ("bad film", "y")],
            [],
            "has no column 'text'; found 'words', 'label'",
        ),
        ([("text", "label")], [], "has no rows"),
        (
            [("text", "label"), ("good film", "x"), ("bad film", "y")],
            ["--task.regression", "true"],
            "expected a number",
        ),
        ([("text", "label"), ("good film", "x"), ("bad film",)], [], "line 3 has 1 columns, expected 2"),
        ([("text", "label"), ("a", "x"), ("the", "y")], ["--task.metric", "bleu"], 'task.metric is "bleu", expected'),
        (
            [("text", "label"), ("a", "x"), ("the", "y")],
            ["--data.sequence_length", "65"],
            "max_position_embeddings, 64",
        ),
    ],
)
def test_input_that_cannot_be_used_is_refused_before_anything_is_written(
    bert, tmp_path, capsys, rows, options, expected
):
    path = write_table(tmp_path / "train.tsv", None, rows)
    dev = write_table(tmp_path / "dev.tsv", None, rows)
    files = ["--data.files", path, "--data.held_out_files", dev]
    assert main(["--config", "classification.json", *files, *fast(bert, tmp_path / "run"), *options]) == 2
    assert expected in capsys.readouterr().err and not os.path.exists(tmp_path / "run")


def test_a_checkpoint_of_other_labels_is_refused_unless_a_new_head_is_asked_for(bert, reviews, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["--config", "sst2.json", *reviews, *fast(bert, run), "--training.epochs", "0.2"]) == 0
    checkpoint = str(run / "checkpoints" / "step_00000001")
    again = ["--config", "sst2.json", *reviews, *fast(checkpoint, other), "--training.epochs", "0.2"]
    again += ["--task.labels", '["poor", "rich"]']
    assert main(again) == 2
    error = capsys.readouterr().err
    assert 'id2label is {"0": "negative", "1": "positive"}' in error and "--task.new_head true" in error
    assert not other.exists()
    assert main([*again, "--task.new_head", "true"]) == 0


def test_a_model_and_files_have_to_be_named(bert, reviews, tmp_path, capsys):
    assert main(["--config", "classification.json", *reviews]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["--config", "rte.json", "--model", bert, "--task.folder", str(tmp_path)]) == 2
    assert os.path.join(str(tmp_path), "RTE", "train.tsv") in capsys.readouterr().err


def test_a_checkpoint_scores_on_labelled_files_what_it_did_in_its_run(bert, reviews, tmp_path, capsys):
    run = tmp_path / "run"
    exact = ["--training.epochs", "1", "--training.precision", "float32"]
    assert main(["--config", "sst2.json", *reviews, *fast(bert, run), *exact]) == 0
    (expected,) = lines_of(run / "held_out.jsonl")
    found = evaluate(EvaluateOptions(str(run / "checkpoints" / "step_00000005"), [reviews[-1]], "cpu", "float32", 7))
    assert found.pop("checkpoint") and {"step": 5, **found} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        ["--parallel.pipeline", "2"],
        pytest.param(["--parallel.shard", "full"], marks=pytest.mark.exhaustive),
        pytest.param([], marks=pytest.mark.exhaustive),
    ],
    ids=["pipeline", "shard", "data parallel"],
)
def test_two_processes_score_what_one_does(bert, reviews, tmp_path, way):
    exact = ["--training.epochs", "2", "--training.precision", "float32", "--device", "cpu"]
    exact += ["--model.hidden_dropout_prob", "0", "--model.attention_probs_dropout_prob", "0"]
    words = ["--config", "sst2.json", *reviews, *exact]
    assert main([*words, *fast(bert, tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [os.path.join(ROOT, "run_finetuning.py"), *words, *fast(bert, tmp_path / "two"), *way]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (lines_of(tmp_path / name / "held_out.jsonl") for name in ("one", "two"))
    assert len(one) == 2 and all(a == pytest.approx(b, abs=1e-5) for a, b in zip(one, two))
    one, two = (lines_of(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [line["probability"] for line in one] == pytest.approx([line["probability"] for line in two], abs=1e-5)


def test_settings_that_would_be_ignored_are_refused_and_another_name_for_the_model_is_taken(
    bert, reviews, tmp_path, capsys
):
    run = tmp_path / "run"
    command = ["--config", "sst2.json", *reviews, *fast(bert, run), "--training.epochs", "0.2"]
    for options, expected in (
        (["--plan", "--device", "cpu"], "plan is true"),
        (["--task.text_columns", '["sentence", "sentence", "label"]'], "one column, or the two of a pair"),
        (["--training.epochs", "null", "--training.patience", "2"], "training.patience is 2, expected null"),
    ):
        assert main([*command, *options]) == 2 and not run.exists()
        assert expected in capsys.readouterr().err
    command[command.index("--model")] = "--training.start_from"
    assert main(command) == 0


def test_rows_of_glue_that_are_broken_are_left_out_and_counted(bert, tmp_path, capsys):
    rows = [(text, text, good) for text, good in sentences(9, 4)]
    header = ["question1", "question2", "is_duplicate"]
    train = write_table(tmp_path / "train.tsv", header, [*rows[:3], ("half a question",), *rows[3:]])
    run = tmp_path / "run"
    command = ["--config", "qqp.json", *fast(bert, run), "--training.epochs", "1", "--data.files", train]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "1 such rows are left out" in output and "9 examples" in output


def test_no_value_is_no_text_and_no_label(bert, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "good film", "label": "x"}\n{"text": null, "label": "y"}\n')
    command = ["--config", "classification.json", "--data.files", str(path), *fast(bert, tmp_path / "run")]
    assert main(command) == 2
    assert "line 2: 'text' is null" in capsys.readouterr().err


def test_labels_that_are_numbers_are_not_counted_instead(bert, tmp_path, capsys):
    files = []
    for name, labels in (("train.tsv", (1, 2)), ("dev.tsv", (0, 1))):
        files.append(write_table(tmp_path / name, ["text", "label"], [("good film", label) for label in labels]))
    command = ["--config", "classification.json", *fast(bert, tmp_path / "run")]
    assert main([*command, "--data.files", files[0], "--data.held_out_files", files[1]]) == 2
    assert "the label is '0', expected one of 1, 2" in capsys.readouterr().err


def test_a_run_killed_before_best_json_says_so_scores_its_weights_again(bert, reviews, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = ["--config", "sst2.json", *reviews, *fast(bert, run), "--training.epochs", "1"]

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("bert.run.loop.mark_best", killed)
        with pytest.raises(SystemExit):
            main(command)
    assert main([*command, "--resume", "auto"]) == 0
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == 5
    assert len(lines_of(run / "held_out.jsonl")) == 1


def test_a_suite_is_checked_before_its_first_run_and_goes_on_where_its_files_have_moved(bert, tmp_path, capsys):
    run, glue = tmp_path / "run", write_glue(tmp_path / "GLUE")
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"configs": ["cola.json", "rte.json"]}))
    train = os.path.join(glue, "RTE", "train.tsv")
    os.rename(train, train + ".good")
    write_table(train, ["sentence1", "sentence2", "other"], [("a", "the", "entailment")])
    command = ["--config", str(suite), *fast(bert, run), "--training.epochs", "0.5", "--task.folder"]
    assert main([*command, glue]) == 2
    assert "has no column 'label'" in capsys.readouterr().err and not run.exists()
    os.rename(train + ".good", train)
    assert main([*command, glue]) == 0
    os.rename(glue, glue + "2")
    assert main([*command, glue + "2", "--resume", "auto"]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
