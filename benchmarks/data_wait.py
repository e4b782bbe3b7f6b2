"""The share of a run in which the device waits for data: run_pretraining.py as it is, a few steps on random shards.

    python benchmarks/data_wait.py --config gpu_phase1.json --training.global_batch_size 16384

On IPUs it is the benchmark of sequences/s too. Options are run_pretraining.py's, and those below. The first step, which
compiles, does not count.
"""

import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.synthetic import length_distribution, write_data_set
from bert.command_line import parse_command_line
from data.errors import InputError


def run(own, options):
    config = parse_command_line(options)
    if config.ipu.synthetic_data:
        raise InputError("ipu.synthetic_data is true: run_pretraining.py then shows its speed on the console alone")
    batch_size, data = config.training.global_batch_size, config.data
    with tempfile.TemporaryDirectory() as folder:
        sizes = data.sequence_length, data.mask_tokens, config.model.vocab_size
        shards = write_data_set(folder, own.lengths, own.steps * batch_size, *sizes)
        output = os.path.join(folder, "run")
        command = [sys.executable, os.path.join(ROOT, "run_pretraining.py"), *options, "--data.files", shards]
        command += ["--training.output", output, "--training.max_steps", str(own.steps), "--training.log_every", "1"]
        status = subprocess.run(command).returncode
        if status:
            sys.exit(f"error: run_pretraining.py ended with exit status {status}; its error is above")
        with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as lines:
            steps = [json.loads(line) for line in lines][1:]
    figures = {name: [step[name] for step in steps] for name in ("data_wait_fraction", "sequences_per_second")}
    medians = {name: median(values) for name, values in figures.items()}
    waiting, rate = f"{100 * medians['data_wait_fraction']:.3f} %", f"{medians['sequences_per_second']:.4g}"
    print_table(
        [f"medians of {len(steps)} steps of {batch_size:,} samples", ""],
        [["share of a step that waits for data", waiting], ["sequences/s", rate]],
    )
    write_json(own.json, {**medians, "steps": figures})


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="2 or more (default: %(default)s)")
    parser.add_argument(
        "--lengths",
        type=length_distribution,
        default="wikipedia",
        metavar="full|MEAN|wikipedia",
        help="of the samples (default: %(default)s)",
    )
    own, options = parser.parse_known_args()
    if own.steps < 2:
        parser.error(f"--steps is {own.steps}, expected 2 or more: the first does not count")
    try:
        run(own, options)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
