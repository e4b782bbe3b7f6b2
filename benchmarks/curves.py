"""The losses of several runs side by side: a picture, and their held-out losses.

for p in float32 bfloat16 float8; do
    python run_pretraining.py --config quickstart.json --training.precision $p --training.output runs/$p; done
python benchmarks/curves.py runs/float32 runs/bfloat16 runs/float8 --output curves.png --json curves.json
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import print_table, write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs that ended: metrics.jsonl and held_out.json")
    parser.add_argument("--output", required=True, help="the PNG file")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    import torch
    from matplotlib.figure import Figure

    figure, results = Figure(figsize=(7, 4), layout="constrained"), {}
    axes = figure.add_subplot(xlabel="step", ylabel="MLM loss, nats")
    for folder in arguments.runs:
        name = os.path.basename(os.path.normpath(folder))
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as lines:
            metrics = [json.loads(line) for line in lines]
        with open(os.path.join(folder, "held_out.json"), encoding="utf-8") as file:
            results[name] = {
                "held_out": json.load(file),
                "steps": [line["step"] for line in metrics],
                "mlm_loss": [line["mlm_loss"] for line in metrics],
                "nsp_loss": [line["nsp_loss"] for line in metrics],
            }
        axes.plot(results[name]["steps"], results[name]["mlm_loss"], label=name, linewidth=1)
    axes.legend()
    figure.savefig(arguments.output, dpi=120)
    print_table(
        ["", "MLM loss, last line", "held out: MLM loss", "NSP loss"],
        [
            [
                name,
                f"{found['mlm_loss'][-1]:.4f}",
                f"{found['held_out']['mlm_loss']:.4f}",
                f"{found['held_out']['nsp_loss']:.4f}",
            ]
            for name, found in results.items()
        ],
    )
    write_json(arguments.json, results, torch=torch.__version__)


if __name__ == "__main__":
    main()
