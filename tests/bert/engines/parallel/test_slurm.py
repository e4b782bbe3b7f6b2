"""configs/slurm.sbatch, with small programs in place of Slurm's."""

import os
import signal
import subprocess
import time

from tests import ROOT

SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
trap 'sleep 0.3; echo saved >> "$LOG"; exit 1' TERM
echo running >> "$LOG"
[ "$FAILS" ] && exit 3
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node7\\nnode8\\n' || echo "scontrol $*" >> "$LOG"
"""


def start(folder, **variables):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "LOG": str(folder / "log")}
    command = ["bash", os.path.join(ROOT, "configs", "slurm.sbatch"), "--config", "gpu phase1.json"]
    return subprocess.Popen(command, env={**os.environ, **job, **paths, **variables})


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(tmp_path):
    script, log = start(tmp_path), tmp_path / "log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "running" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    script.wait(20)
    command, *after = log.read_text().splitlines()
    assert after == ["running", "saved", "scontrol requeue 123456"]
    assert "--nnodes 1:2" in command and "--rdzv-endpoint node7:23456" in command
    assert command.endswith("run_pretraining.py --resume auto --config gpu phase1.json")


def test_a_job_that_fails_is_not_queued_again(tmp_path):
    assert start(tmp_path, FAILS="1").wait(20) == 3
    assert "requeue" not in (tmp_path / "log").read_text()
