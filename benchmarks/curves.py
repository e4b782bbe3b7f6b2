"""The losses of several runs side by side: a picture, and their held-out losses.

    for p in float32 bfloat16 float8; do
        python run_pretraining.py --config quickstart.json --training.precision $p --training.output runs/$p; done
    python benchmarks/curves.py runs/float32 runs/bfloat16 runs/float8 --output curves.png --json curves.json

Losses are the metrics whose names end in "loss"; those that all runs have are compared.
"""

import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import make_parser, print_table, write_json


def read_run(folder):
    """The run's steps, its losses at them, and its held-out evaluation."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    with open(os.path.join(folder, "held_out.json"), encoding="utf-8") as file:
        held_out = json.load(file)
    losses = {name: [line[name] for line in metrics] for name in metrics[0] if name.endswith("loss")}
    return {"held_out": held_out, "steps": [line["step"] for line in metrics], **losses}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs that ended: metrics.jsonl and held_out.json")
    parser.add_argument("--output", required=True, help="the PNG file")
    arguments = parser.parse_args()
    import torch
    from matplotlib.figure import Figure

    runs = {os.path.basename(os.path.normpath(folder)): read_run(folder) for folder in arguments.runs}
    first, *others = runs.values()
    losses = [name for name in first if name.endswith("loss") and all(name in run for run in others)]
    columns = ["", *(title for loss in losses for title in (f"{loss}, last line", "held out"))]
    figure = Figure(figsize=(7 * len(losses), 4), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses):
        axes.set(xlabel="step", ylabel=f"{loss}, nats")
        for name, run in runs.items():
            axes.plot(run["steps"], run[loss], label=name, linewidth=1)
        axes.legend()
    figure.savefig(arguments.output, dpi=120)
    rows = []
    for name, run in runs.items():
        values = [value for loss in losses for value in (run[loss][-1], run["held_out"].get(loss, math.nan))]
        rows.append([name, *(f"{value:.4f}" for value in values)])
    print_table(columns, rows)
    write_json(arguments.json, runs, torch=torch.__version__)


if __name__ == "__main__":
    main()
