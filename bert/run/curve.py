"""The picture of a run: metrics.jsonl -> curve.png."""

import json
from typing import Dict, List

from bert.tasks import Task

__all__ = ["draw_curve", "read_metrics"]


def read_metrics(path: str) -> List[Dict]:
    """The objects of a metrics.jsonl, one a line; a last line that a kill cut off is left out."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def draw_curve(metrics: List[Dict], task: Task, path: str, title: str) -> None:
    """Draws the parts of the task's loss and the learning rate over the steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = [(panel.title, panel.loss, "nats") for panel in task.panels] + [("learning rate", "learning_rate", "")]
    figure, row = pyplot.subplots(1, len(pictures), figsize=(11 / 3 * len(pictures), 3.2), layout="constrained")
    steps = [line["step"] for line in metrics]
    for number, (axes, (name, key, unit)) in enumerate(zip(row, pictures)):
        axes.plot(steps, [line[key] for line in metrics], color=f"C{number}")
        axes.set(title=name, ylabel=unit, xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
