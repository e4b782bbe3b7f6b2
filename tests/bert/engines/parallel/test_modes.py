"""Sharded state and pipelines of processes: each way to share the work does what one process does."""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.bert.engines.parallel.started import environment

SCRIPT = os.path.join(ROOT, "tests", "bert", "engines", "parallel", "modes.py")
SHARDS = ["shard optimizer", "shard full", "shard optimizer adamw", "shard full muon"]
WAYS = {
    2: ["pipeline 2 3"],
    3: SHARDS,
    4: ["pipeline 2 1", "pipeline 4 1 adamw", "shard full", "pipeline 2 2 muon"],
}


def found(folder, processes, precision):
    """What each process found, of each way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [SCRIPT, str(folder), precision, *WAYS[processes]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
def test_every_way_to_share_the_work_gives_the_weights_and_metrics_of_one_process(tmp_path, processes):
    for of_rank in found(tmp_path, processes, "float32"):
        for way, result in of_rank.items():
            # Muon orthogonalises in bfloat16, whose sums differ where a matrix is cut.
            tolerance = 0.02 if way.endswith("muon") and way.startswith("shard") else 1e-5
            assert result["weights"] <= tolerance and result["metrics"] <= 10 * tolerance, (way, result)
            # A gradient in the last process that is not a number is a skipped update in all.
            assert result["skipped"] == 1 and result["unchanged"], (way, result)


@pytest.mark.slow
def test_in_bfloat16_they_are_as_close_as_its_rounding(tmp_path):
    for of_rank in found(tmp_path, 3, "bfloat16"):
        for way, result in of_rank.items():
            assert result["weights"] <= 0.02 and result["metrics"] <= 0.01, (way, result)
            assert result["skipped"] == 1 and result["unchanged"], (way, result)
