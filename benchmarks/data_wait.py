"""The share of a run in which the device waits for data: run_pretraining.py as it is, a few steps on random shards.

    python benchmarks/data_wait.py --config gpu_phase1.json --training.global_batch_size 16384

On IPUs it is the benchmark of sequences/s too. Options are run_pretraining.py's, and those below. The first step, which
compiles, does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from benchmarks.report import median, print_table, write_json
from benchmarks.synthetic import length_distribution, write_data_set
from bert.command_line import parse_command_line
from data.errors import InputError


def run(own, options):
    config = parse_command_line(options)
    count = own.steps * config.training.global_batch_size
    with tempfile.TemporaryDirectory() as folder:
        shards = write_data_set(
            folder, own.lengths, count, config.data.sequence_length, config.data.mask_tokens, config.model.vocab_size
        )
        output = os.path.join(folder, "run")
        options = options + [
            "--data.files",
            shards,
            "--training.output",
            output,
            "--training.max_steps",
            str(own.steps),
            "--training.log_every",
            "1",
        ]
        done = subprocess.run([sys.executable, os.path.join(ROOT, "run_pretraining.py")] + options)
        if done.returncode:
            sys.exit(f"error: run_pretraining.py ended with exit status {done.returncode}; what it said is above")
        with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as lines:
            steps = [json.loads(line) for line in lines][1:]
    found = {name: [step[name] for step in steps] for name in ("data_wait_fraction", "sequences_per_second")}
    results = {name: median(values) for name, values in found.items()}
    print_table(
        [f"medians of {len(steps)} steps of {config.training.global_batch_size} samples", ""],
        [
            ["share of a step that waits for data", f"{100 * results['data_wait_fraction']:.3f} %"],
            ["sequences/s", f"{results['sequences_per_second']:.4g}"],
        ],
    )
    write_json(own.json, {**results, "steps": found})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=5, help="2 or more (default: %(default)s)")
    parser.add_argument(
        "--lengths",
        type=length_distribution,
        default="wikipedia",
        metavar="full|MEAN|wikipedia",
        help="of the samples (default: %(default)s)",
    )
    parser.add_argument("--json", help="write the figures here")
    own, options = parser.parse_known_args()
    if own.steps < 2:
        parser.error(f"--steps is {own.steps}, expected 2 or more: the first does not count")
    try:
        run(own, options)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
