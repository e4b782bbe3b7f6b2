"""The benchmarks run and print what they measured; how fast that is, is not a test's business."""

import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = {"device": "cpu", "model": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "intermediate_size": 64, "max_position_embeddings": 64},
        "data": {"sequence_length": 64, "mask_tokens": 10}, "training": {"global_batch_size": 16}, "ipu": {"layers_per_ipu": [0, 1]}}


def run(tmp_path, *command):
    result = tmp_path / "result.json"
    done = subprocess.run([sys.executable] + [str(word) for word in command] + ["--json", str(result)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["about"]["date"] and found["about"]["command"] and found["about"]["cores"]
    return found["results"], done.stdout


def test_the_pretraining_benchmark_measures_both_on_the_same_samples(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    found, printed = run(tmp_path, "benchmarks/pretraining.py", "--config", tmp_path / "tiny.json", "--samples", 12, "--rounds", 1,
                         "--lengths", 40, "--against", "transformers")
    assert "12 samples of mean length" in printed
    for way in ("this project", "transformers"):
        assert found[way]["sequences_per_second"] > 0 and 0 < found[way]["share_of_gemm_rate"] < 1


def test_the_loader_benchmark_measures_every_way(tmp_path):
    found, printed = run(tmp_path, "benchmarks/loader.py", "--samples", 3000, "--batch-size", 256, "--seconds", 0.2, "--rounds", 1)
    assert len(found["samples_per_second"]) == 7 and all(rate > 0 for rate in found["samples_per_second"].values())
    assert "3000 samples of length 128" in printed


def test_the_lamb_benchmark_measures_every_form_beside_a_copy(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    found, printed = run(tmp_path, "benchmarks/lamb.py", "--config", tmp_path / "tiny.json", "--rounds", 1)
    assert found["implementation"] == "native" and found["copy_bytes_per_second"] > 0
    assert len(found["ways"]) == 5 and all(one["seconds"] > 0 for one in found["ways"].values())
    assert "of the copy bandwidth" in printed


def test_useful_work_is_the_recipes():
    from benchmarks.pretraining import make_samples, useful_flops
    from bert.config import parse_command_line
    for name, expected in (("pod16_phase1", 70e9), ("pod16_phase2", 301e9)):
        config = parse_command_line(["--config", name])
        samples = make_samples(config, 4, None)
        samples.mlm_counts[:] = config.data.mask_tokens
        assert useful_flops(config.model, samples) / 4 == pytest.approx(expected, rel=0.02)
