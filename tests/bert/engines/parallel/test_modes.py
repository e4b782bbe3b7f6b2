"""Sharded state and pipelines of processes: each way to share the work does what one process does."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from bert.run.checkpoint import read_safetensors
from run_pretraining import main
from tests import ROOT
from tests.bert.engines.parallel.started import SMALL, environment, torchrun
from tests.bert.engines.parallel.test_processes import assert_close_runs
from tests.bert.run.runs import arguments, checkpoints, make_shards

SCRIPT = os.path.join(ROOT, "tests", "bert", "engines", "parallel", "modes.py")
WAYS = {
    3: [
        "shard none",
        "shard optimizer",
        "shard full",
        "shard optimizer adamw",
        "shard full muon",
        "shard full bfloat16",
    ],
    4: ["pipeline 2 1", "pipeline 2 1 full", "pipeline 4 1 adamw", "pipeline 2 3 optimizer", "pipeline 2 2 bfloat16"],
}


def found(folder, processes):
    """What each process found, of each way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [SCRIPT, str(folder), *WAYS[processes]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(3, marks=pytest.mark.exhaustive), 4])
def test_every_way_to_share_the_work_gives_the_weights_and_metrics_of_one_process(tmp_path, processes):
    for of_rank in found(tmp_path, processes):
        for way, result in of_rank.items():
            # Muon orthogonalises in bfloat16, and updates of AdamW begin with one size, however small a gradient is.
            tolerance = 0.01 if "muon" in way or "bfloat16" in way else 1e-3 if "adamw" in way else 1e-5
            assert result["together"] <= tolerance and result["metrics"] <= tolerance, (way, result)
            # Gradients that cancel down to their rounding are few values, and mean little in bfloat16.
            assert result["weights"] <= 100 * tolerance, (way, result)
            # A gradient in the last process that is no number is a skipped update in all. Without shards all have it.
            assert way == "shard none" or (result["skipped"] == 1 and result["unchanged"]), (way, result)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_goes_on_from_any_way_to_share_the_work_in_any_other(tmp_path):
    shards = make_shards(tmp_path / "shards")
    words = arguments(tmp_path, shards, **SMALL, training__save_every=2)
    assert main([*words, "--training.output", str(tmp_path / "one")]) == 0
    run = [*words, "--training.output", str(tmp_path / "mixed"), "--resume", "auto"]
    for processes, stop, options in (
        (4, 3, ["--parallel.pipeline", "2", "--parallel.shard", "full"]),
        (1, 5, []),
        (3, 8, ["--parallel.shard", "optimizer"]),
    ):
        options += ["--training.stop_at_step", str(stop)]
        if processes == 1:
            assert main([*run, *options]) == 0
            continue
        status, out, errors = torchrun(processes, tmp_path / f"notes {processes}", [*run, *options])
        assert status == 0, (out, errors)
        assert out.count(f"{processes} processes") == 1 and out.count("saved ") == 2, out
    assert_close_runs(tmp_path, "one", "mixed")
    model = transformers.AutoModelForPreTraining.from_pretrained(checkpoints(tmp_path, "mixed")[-1])
    weights = read_safetensors(os.path.join(checkpoints(tmp_path, "one")[-1], "model.safetensors"))
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.allclose(model.state_dict()[name], weights[name], rtol=1e-4, atol=1e-6)
