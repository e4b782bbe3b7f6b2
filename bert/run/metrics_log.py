"""The lines of a run: metrics.jsonl, held_out.jsonl, TensorBoard and the console.

A fork that logs elsewhere too does it in `write` and `write_held_out`.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional

from bert.engines import Engine
from bert.errors import Diverged
from bert.signals import protected
from bert.tasks import Task
from bert.text import duration, percent

__all__ = ["MetricsLog"]

logger = logging.getLogger(__name__)
NOT_IN_TENSORBOARD = ("step", "samples_seen", "samples")
WIDTH = 100  # characters of a line, at most


class Line(NamedTuple):
    """A line that is due: the steps since the line before it."""

    step: int
    """The last of them."""
    learning_rate: float
    samples_seen: int
    metrics: List[Mapping[str, Any]]
    samples: int


class MetricsLog:
    """Writes a line every few steps, each from the metrics of the steps since the line before.

    A line that is due may wait until the next step is under way: where the device works on its own, reading metrics
    then costs no time. A context manager.
    """

    def __init__(self, folder: str, engine: Engine, last_step: int):
        self.engine, self.last_step = engine, last_step
        self.closing = contextlib.ExitStack()
        path, self.held_out_path = (
            os.devnull if engine.rank else os.path.join(folder, f"{name}.jsonl") for name in ("metrics", "held_out")
        )
        self.file = self.closing.enter_context(open(path, "a", encoding="utf-8"))  # noqa: SIM115
        self.board: Any = (
            None if engine.rank else open_board(os.path.join(folder, "tensorboard"), engine.steps_done + 1)
        )
        if self.board:
            self.closing.enter_context(self.board)
        self.due: Optional[Line] = None
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.closing.close()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leaves the time inside out of sequences/s."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before

    def end_line(self, step: int, learning_rate: float, samples_seen: int, metrics: List[Mapping[str, Any]]) -> None:
        """Makes a line due, of `metrics` of the steps up to `step`."""
        self.due, self.samples = Line(step, learning_rate, samples_seen, metrics, self.samples), 0

    def write(self) -> None:
        """Writes the line that is due, if any. Raises Diverged where its loss is not finite."""
        if self.due is None:
            return
        self.engine.wait_for(self.due.step)
        seconds = time.perf_counter() - self.since
        values = line_of(self.due, self.engine, seconds, self.waited)
        if not math.isfinite(values.get("loss", 0.0)):
            parts = [f"the {panel.title} is {values[panel.loss]:f}" for panel in self.engine.task.panels]
            raise Diverged(f"step {self.due.step}: {', '.join(parts)}")
        seconds_a_step = seconds / (len(self.due.metrics) * self.engine.steps_per_call)
        with protected():
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
            self.due = None
        self.draw(values)
        self.show(values, (self.last_step - values["step"]) * seconds_a_step)
        self.since, self.waited = time.perf_counter(), 0.0

    def write_held_out(self, values: Dict[str, Any], is_best: bool) -> None:
        """Writes the metrics of an evaluation: what held_out.jsonl holds, a line each."""
        with protected(), open(self.held_out_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.draw(values, "held_out/")
        words = f"loss {values['loss']:.3f}  {panel_words(self.engine.task, values)}{scores(self.engine.task, values)}"
        place = f"step {values['step']}/{self.last_step}  held out ({values['samples']} samples)"
        logger.info(f"{place}: {words}{'  best' if is_best else ''}")

    def draw(self, values: Dict[str, Any], group: str = "") -> None:
        """Hands values to TensorBoard."""
        for name in [name for name in values if self.board and name not in NOT_IN_TENSORBOARD]:
            self.board.add_scalar(group + name, values[name], values["step"])

    def show(self, values: Dict[str, Any], seconds_left: float) -> None:
        """The line for people. What is least wanted is left out where it would have more than WIDTH characters."""
        rate, waiting, skipped = (values[k] for k in ("sequences_per_second", "data_wait_fraction", "skipped_updates"))
        parts = {
            "step": f"step {values['step']}/{self.last_step}",
            "loss": f"loss {values['loss']:.3f}" if "loss" in values else "",
            "panels": panel_words(self.engine.task, values) if "loss" in values else "",
            "learning rate": f"lr {values['learning_rate']:.1e}",
            "rate": f"{rate:.{0 if rate >= 100 else 1}f} seq/s",
            "waiting": f"data wait {percent(waiting)}" if waiting >= 0.01 else "",
            "skipped": f"{skipped} skipped" if skipped else "",
            "left": f"{duration(seconds_left)} left",
        }
        for name in ("waiting", "loss", "learning rate"):
            if len("  ".join(filter(None, parts.values()))) > WIDTH:
                parts[name] = ""
        logger.info("  ".join(filter(None, parts.values())))


def open_board(folder: str, first_step: int) -> Any:
    """TensorBoard's writer; None, and a line that says so, where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        logger.info("tensorboard is not installed: its files are left out; metrics.jsonl has all that they would show")
        return None
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    return SummaryWriter(folder, purge_step=first_step)


def line_of(due: Line, engine: Engine, seconds: float, waited: float) -> Dict[str, Any]:
    """The object in metrics.jsonl; of made-up input without losses."""
    task, means = engine.task, {}
    if not engine.made_up:
        means = {name: sum(float(values[name]) for values in due.metrics) / len(due.metrics) for name in task.metrics}
        means = {"loss": sum(means[panel.loss] for panel in task.panels), **means}
    return {
        "step": due.step,
        **means,
        "learning_rate": due.learning_rate,
        "sequences_per_second": due.samples / seconds,
        "data_wait_fraction": waited / seconds,
        "samples_seen": due.samples_seen,
        "skipped_updates": int(due.metrics[-1]["skipped_updates"]),
    }


def panel_words(task: Task, values: Mapping[str, Any]) -> str:
    """The parts of the loss and their accuracies, for a line: `mlm 5.772 (14.5%)  nsp 0.693 (52.3%)`."""
    shares = {part: f" ({values[part.accuracy]:.1%})" if part.accuracy else "" for part in task.panels}
    return "  ".join(f"{part.label} {values[part.loss]:.3f}{share}" for part, share in shares.items())


def scores(task: Task, values: Mapping[str, Any]) -> str:
    """What an evaluation gives beyond the loss and its parts, for the same line."""
    others = [name for name in values if name not in ("step", "samples", "loss", *task.metrics)]
    return "".join(f"  {name} {values[name]:.4f}" for name in others)
