"""The picture of a run: metrics.jsonl and held_out.jsonl -> curve.png.

benchmarks/curves.py draws one or several runs for print, as PDF or SVG.
"""

import importlib.util
import json
import logging
import math
import os
from typing import Dict, List, Sequence

from bert.tasks import Task

__all__ = ["draw_curve", "read_metrics", "smooth"]

logger = logging.getLogger(__name__)


def read_metrics(path: str) -> List[Dict]:
    """The objects of a metrics.jsonl or held_out.jsonl, one a line; none where there is no file. A last line that a
    kill cut off is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def smooth(values: Sequence[float]) -> List[float]:
    """Means over a window of 1/50 of all values around each; at the ends the window is cut off."""
    half = len(values) // 100
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_curve(metrics: List[Dict], held_out: List[Dict], task: Task, path: str, title: str) -> bool:
    """Draws the parts of the task's loss, the score that selects a checkpoint, and the learning rate over the steps
    into a PNG; not where matplotlib is not installed, and says so."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("matplotlib is not installed: no picture is drawn. For one: pip install matplotlib")
        return False
    from matplotlib.figure import Figure

    scores = [(line["step"], line[task.selected_by]) for line in held_out if task.selected_by in line]
    has_score = bool(scores) and task.selected_by != "loss"
    pictures = len(task.panels) + has_score + 1
    figure = Figure(figsize=(11 / 3 * pictures, 3.2), layout="constrained")
    *row, last = figure.subplots(1, pictures)
    steps = [line["step"] for line in metrics]
    for number, (axes, panel) in enumerate(zip(row, task.panels)):
        values, colour = [line[panel.loss] for line in metrics], f"C{number}"
        if len(values) < 100:  # too few for a window
            axes.plot(steps, values, color=colour, label="training")
        else:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values), color=colour, label="training, smoothed")
        points = [(line["step"], line[panel.loss]) for line in held_out if panel.loss in line]
        if points:
            axes.plot(*zip(*points), "o", color="black", markersize=3, label="held out")
        if not math.isnan(panel.chance):
            axes.axhline(panel.chance, color="grey", linestyle=":", label="chance")
        axes.set(title=panel.title, ylabel="nats")
        axes.legend(fontsize="small")
    if has_score:
        row[-1].plot(*zip(*scores), "o-", color="black", markersize=3)
        row[-1].set(title=f"held-out {task.selected_by}")
    last.plot(steps, [line["learning_rate"] for line in metrics], color=f"C{len(row)}")
    last.set(title="learning rate")
    for axes in (*row, last):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return True
