"""The benchmarks run and print what they measured; how fast that is, is not a test's business."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import data_wait, scaling, time_to_loss, trainer
from benchmarks.processes import Worker
from benchmarks.synthetic import random_samples, write_data_set
from bert.engines.torch_devices import Cpu
from data.errors import InputError
from data.samples import check_samples
from tests import ROOT
from tests.bert.tasks.tiny import make_bert

TINY = {
    "device": "cpu",
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "data": {"sequence_length": 64, "mask_tokens": 10},
    "training": {"global_batch_size": 16},
}


def run(tmp_path, *command):
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, *map(str, command), "--json", str(result)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    assert written["about"]["date"] and written["about"]["command"] and written["about"]["cores"]
    return written["results"], done.stdout


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path / "tiny.json"


@pytest.mark.slow
def test_the_pretraining_benchmark_measures_both_on_the_same_samples(tmp_path, tiny):
    options = ["--samples", "40", "--rounds", "2", "--lengths", "40", "--against", "transformers"]
    results, printed = run(tmp_path, "benchmarks/pretraining.py", "--config", tiny, *options)
    assert "40 samples of mean length" in printed and abs(results["mean_length"] - 40) < 8
    for way in results["ways"].values():
        assert way["sequences_per_second"] > 0 and 0 < way["share_of_gemm_rate"] < 1
        assert way["tokens_per_second"] == pytest.approx(way["sequences_per_second"] * results["mean_length"])
        assert way["parts"].keys() == {"data", "forward", "backward", "optimizer"} and min(way["parts"].values()) > 0
        assert 2e7 < way["peak_bytes"] < 4e9
    tried = results["ways"]["transformers"]["micro_batches_tried"]
    # 1,024, 2,048 and 4,096 token slots in rows of 64, of which there are 40
    types = ["float32", "bfloat16"] if Cpu().has_bfloat16() else ["float32"]
    assert tried.keys() == {f"{rows} rows, {name}" for rows in (16, 32, 40) for name in types}
    picture = tmp_path / "bars.png"
    subprocess.run(
        [sys.executable, "benchmarks/plot.py", tmp_path / "result.json", "--output", picture], cwd=ROOT, check=True
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_pretraining_benchmark_takes_the_samples_that_it_is_told_to(tmp_path, tiny):
    shards = write_data_set(str(tmp_path), "full", 20, 64, 10, 300)
    options = "--samples", 12, "--rounds", 1, "--data.files", shards
    results, _ = run(tmp_path, "benchmarks/pretraining.py", "--config", tiny, *options)
    assert results["samples_from"] == str(tmp_path / "train-00000.h5")
    assert (results["samples"], results["mean_length"]) == (12, 64)
    done = subprocess.run(
        [sys.executable, "benchmarks/pretraining.py", "--config", tiny, "--data.files", tmp_path / "none-*.h5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "none-*.h5" in done.stderr


def fail(message):
    raise ValueError(message)


def test_a_process_that_fails_ends_the_benchmark_with_its_message(capfd):
    with Worker(str, "held") as worker:
        assert worker.ask(str.upper) == "HELD"
        with pytest.raises(SystemExit, match="exit code 1"):
            worker.ask(fail)
    assert "ValueError: held" in capfd.readouterr().err


@pytest.mark.parametrize(
    "distribution, longest, mean",
    [("full", 128, 128), ("wikipedia", 512, 256), ("wikipedia", 128, 122), (369, 512, 369), (40, 512, 40)],
)
def test_random_samples_have_the_lengths_that_are_asked_for(distribution, longest, mean):
    samples = random_samples(distribution, 20000, longest, longest // 6, 30522, np.random.default_rng())
    check_samples(samples, 30522, "random", 0)
    assert samples.lengths.mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_ops_benchmark_measures_every_operation_in_both_shapes(tmp_path):
    picture = tmp_path / "ops.png"
    results, printed = run(tmp_path, "benchmarks/ops.py", "--device", "cpu", "--rounds", 1, "--plot", picture)
    from benchmarks.ops import CASES

    assert {(case["operation"], case["phase"]) for case in results["cases"]} == {
        (name, phase) for name in CASES for phase in ("phase 1", "phase 2")
    }
    for case in results["cases"]:
        assert "plain" in case["ways"] and len(case["ways"]) > 1
        assert all(way["seconds"] > 0 for way in case["ways"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_data_wait_benchmark_runs_the_command(tmp_path, tiny):
    results, printed = run(tmp_path, "benchmarks/data_wait.py", "--config", tiny, "--steps", 3)
    assert "step 3/3" in printed and len(results["steps"]["data_wait_fraction"]) == 2
    assert 0 <= results["data_wait_fraction"] < 1 and results["sequences_per_second"] > 0


def test_the_data_wait_benchmark_wants_metrics(tiny):
    with pytest.raises(InputError, match="ipu.synthetic_data is true: .* on the console alone"):
        data_wait.run(None, ["--config", str(tiny), "--ipu.synthetic_data", "true"])


def test_the_loader_benchmark_measures_every_way(tmp_path):
    options = ["--samples", "3000", "--batch-size", "256", "--seconds", "0.2", "--rounds", "1"]
    results, printed = run(tmp_path, "benchmarks/loader.py", *options)
    assert len(results["samples_per_second"]) == 7 and all(rate > 0 for rate in results["samples_per_second"].values())
    assert "3,000 samples of length 128" in printed


def test_the_loader_benchmark_measures_processes_that_share_one(tmp_path):
    options = ["--samples", "9000", "--batch-size", "256", "--seconds", "0.1", "--rounds", "1", "--ranks", "2"]
    results, printed = run(tmp_path, "benchmarks/loader.py", *options)
    shared, own, torchs = results["ranks"]
    assert shared["ring_bytes"] * 2 == own["ring_bytes"] and shared["peak_bytes"] < own["peak_bytes"]
    assert all(way["samples_per_second"] > 0 for way in (shared, own, torchs)) and "2, shared loader" in printed


def test_the_lamb_benchmark_measures_every_form_beside_a_copy(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    results, printed = run(tmp_path, "benchmarks/lamb.py", "--config", tmp_path / "tiny.json", "--rounds", 1)
    assert results["implementation"] == "native" and results["copy_bytes_per_second"] > 0
    assert len(results["ways"]) == 4 and all(way["seconds"] > 0 for way in results["ways"].values())
    assert "of the copy bandwidth" in printed


def test_useful_work_is_the_recipes():
    from benchmarks.pretraining import make_samples, useful_flops
    from bert.command_line import parse_command_line

    for name, expected in (("pod16_phase1", 70e9), ("pod16_phase2", 301e9)):
        config = parse_command_line(["--config", name])
        samples, _ = make_samples(config, 4, "full")
        samples.mlm_counts[:] = config.data.mask_tokens
        assert useful_flops(config.model, samples) / 4 == pytest.approx(expected, rel=0.02)


def test_results_of_every_kind_are_merged_into_one_file(tmp_path):
    folder = os.path.join(ROOT, "benchmarks", "results")
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".json")]
    assert any("lamb" in path for path in paths) and any("pretraining" in path for path in paths)
    output = tmp_path / "all.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/merge.py", *paths, "--output", output], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    merged = json.loads(output.read_text())
    assert len(merged) == len(paths) and "pretraining-phase1-2cores, this project" in done.stdout


def make_run(folder, loss, config=None, held_out=()):
    folder.mkdir()
    lines = [
        {"step": s, "own_loss": loss - s / 100, "samples_seen": 8 * s, "sequences_per_second": 4} for s in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"step": s, "own_loss": loss}) + "\n" for s in held_out))
    if config:
        (folder / "run.json").write_text(json.dumps({"sessions": [{"config": config}]}))
    return folder


def test_curves_of_runs_are_drawn_side_by_side(tmp_path):
    one, two = make_run(tmp_path / "one", 5.0), make_run(tmp_path / "two", 6.0)
    (one / "held_out.json").write_text(json.dumps({"own_loss": 5.0, "accuracy": 0.7}))
    picture = tmp_path / "curves.png"
    results, printed = run(tmp_path, "benchmarks/curves.py", one, two, "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "own_loss" in printed and "4.6000" in printed and "5.0000" in printed and "nan" in printed
    assert results["two"][str(two)]["steps"][:2] == [1, 2] and results["two"][str(two)]["own_loss"][0] == 5.99


def test_seeds_of_one_setting_are_one_curve_with_their_mean_and_deviation_and_text_stays_text(tmp_path):
    def config(seed, rate):
        return {"training": {"seed": seed, "output": f"runs/{rate}-{seed}"}, "optimizer": {"learning_rate": rate}}

    for name, seed, rate, loss in (("low-seed1", 1, 0.1, 5.0), ("low-seed2", 2, 0.1, 5.2), ("high", 1, 0.2, 6.0)):
        make_run(tmp_path / name, loss, config(seed, rate), held_out=[20, 40])
    folders = sorted(tmp_path.iterdir())
    picture = tmp_path / "curves.svg"
    words = [*folders, "--output", picture, "--against", "hours"]
    results, printed = run(tmp_path, "benchmarks/curves.py", *words)
    assert all(text in picture.read_text() for text in (">low (mean of 2, lowest to highest)<", ">hours of training<"))
    assert {name: len(runs) for name, runs in results.items()} == {"high": 1, "low": 2}
    assert "5.1000 ± 0.1414" in printed and "6.0000" in printed
    assert results["high"][str(tmp_path / "high")]["places"][-1] == pytest.approx(40 * 2 / 3600)
    # Named by hand, whatever the settings; a seed that is there twice is no group.
    make_run(tmp_path / "again", 6.0, config(1, 0.2))
    picture = tmp_path / "curves.pdf"
    words = [tmp_path / "high", tmp_path / "again", "--group", f"all={tmp_path}/low-*", "--output", picture]
    results, _ = run(tmp_path, "benchmarks/curves.py", *words)
    assert [len(runs) for runs in results.values()] == [2, 1, 1] and "all" in results
    assert b"/FontFile2" in picture.read_bytes()  # a TrueType font, whose letters can be searched


def test_the_peer_of_time_to_loss_learns_and_its_evaluations_are_not_timed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    write_data_set(str(tmp_path), "full", 1, 64, 10, 300)
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    blocks = torch.randint(5, 10, (64, 16))  # five tokens of 300
    held_out = {"input_ids": blocks, "attention_mask": torch.ones_like(blocks), "labels": blocks}
    evaluate, evaluated = time_to_loss.held_out_loss, []
    monkeypatch.setattr(time_to_loss, "held_out_loss", lambda *inputs: evaluated.append(1) or evaluate(*inputs))
    hours_long = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * len(evaluated))
    monkeypatch.setattr(trainer, "time", hours_long)
    peer = time_to_loss.Peer(TINY["model"], tokenizer, blocks, held_out, str(tmp_path))
    curve = time_to_loss.train_there(peer, time_to_loss.Setting(16, 1e-2, bfloat16=False), 11, evaluations=2)
    seconds, steps, losses = zip(*curve)
    assert steps == (6, 11) and math.log(300) > losses[0] > losses[1] > 1
    assert 0 < seconds[0] < seconds[1] < 3600


def test_the_time_to_a_loss_is_that_of_the_first_evaluation_below_it(capsys):
    curves = {
        "transformers": [[50, 5, 6.0], [100, 10, 5.0]],
        "this project": [[10, 4, 5.5], [20, 8, 4.9], [30, 12, 4.5]],
    }
    figures, sooner = time_to_loss.report(curves, {"transformers": 20, "this project": 30})
    assert sooner == 5 and figures["this project"]["seconds_to_loss"] == 20
    assert [figures[name]["samples_per_second"] for name in curves] == [2, 12]
    assert "sooner by a factor of 5.00" in capsys.readouterr().out
    curves["this project"] = [[10, 4, 5.5]]
    assert time_to_loss.report(curves, {"transformers": 20, "this project": 30})[1] is None
    assert "not reached" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_time_to_loss_benchmark_trains_both_on_the_same_text(tmp_path, tiny):
    picture = tmp_path / "curves.png"
    options = ["--minutes", 0.02, "--peer", "8:1e-3", "16:1e-3", "--config", tiny, "--plot", picture]
    results, printed = run(tmp_path, "benchmarks/time_to_loss.py", *options, "--optimizer.name", "muon")
    assert len(results["tried"]) == 2 and results["setting"] in results["tried"] and "seconds to" in printed
    for name in ("transformers", "this project"):
        seconds, steps, losses = zip(*results[name]["curve"])
        assert sorted(seconds) == list(seconds) and sorted(steps) == list(steps) and 0 < losses[-1] < math.log(300)
    assert results["config"]["optimizer"]["name"] == "muon" and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_scaling_benchmark_measures_one_and_two_processes_and_draws_them(tmp_path, tiny):
    picture = tmp_path / "scaling.png"
    options = ["--samples", 8, "--rounds", 1, "--steps", 1, "--config", tiny, "--plot", picture]
    results, printed = run(tmp_path, "benchmarks/scaling.py", *options)
    one, two = results["summaries"]
    assert (one["processes"], two["processes"], two["samples"]) == (1, 2, {"weak": 16, "strong": 8})
    for mode in ("weak", "strong"):
        assert one[mode]["efficiency"] == 1 and one[mode]["waiting"] == 0
        assert two[mode]["efficiency"] == pytest.approx(two[mode]["rate"] / one[mode]["rate"])  # of one machine
        assert two[mode]["waiting"] < 1 and two[mode]["waiting_at_batch"] < 1
    assert len(results["runs"][1]["ranks"]) == 2 and "2 strong" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_predicted_efficiency_is_what_the_page_says():
    for row in scaling.prediction_rows():
        assert f"| {' | '.join(row)} |" in read_page("docs/scaling.md")
    free = scaling.predicted(1024, None)[1]
    slow = [scaling.predicted(gpus, link)[1] for link in scaling.LINKS.values() for gpus in scaling.GPUS]
    assert all(0 < efficiency <= 1 for efficiency in slow) and free > scaling.predicted(1024, 25e9 / 8)[1]


def read_page(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_finetuning_benchmark_scores_both_alike(tmp_path):
    model, rng = make_bert(tmp_path / "bert"), np.random.default_rng(0)
    files = []
    for name, count in (("train", 200), ("dev", 60)):
        words = [" ".join(rng.choice(["the", "film", "was", "old"], rng.integers(1, 9))) for _ in range(count)]
        lines = [f"{text} {('rome', 'oslo')[number % 2]}\t{number % 2}\n" for number, text in enumerate(words)]
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
        files += [f"--{name}", tmp_path / f"{name}.tsv"]
    options = ["--steps", 60, "--seeds", 1, "--learning-rate", 0.005, "--entities", 80, "--data.sequence_length=64"]
    results, printed = run(tmp_path, "benchmarks/finetuning.py", "--model", model, *files, *options)
    assert set(results) == {"sentences", "names"} and "slower by" in printed
    for who in ("this project", "transformers"):
        ((score, seconds),) = results["sentences"][who]
        assert score["accuracy"] > 0.9 and seconds > 0
