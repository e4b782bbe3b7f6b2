"""The picture of a run: metrics.jsonl -> curve.png."""

import json
from typing import Dict, List

__all__ = ["draw_curve", "read_metrics"]


def read_metrics(path: str) -> List[Dict]:
    """The objects of a metrics.jsonl, one a line; a last line that a kill cut off is left out."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def draw_curve(metrics: List[Dict], path: str, title: str) -> None:
    """Draws MLM loss, NSP loss and learning rate over the steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [one["step"] for one in metrics]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    left.plot(steps, [one["mlm_loss"] for one in metrics], color="tab:blue")
    left.set(title="MLM loss", ylabel="nats")
    middle.plot(steps, [one["nsp_loss"] for one in metrics], color="tab:orange")
    middle.set(title="NSP loss", ylabel="nats")
    right.plot(steps, [one["learning_rate"] for one in metrics], color="tab:green")
    right.set(title="learning rate")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
