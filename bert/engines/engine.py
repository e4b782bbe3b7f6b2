"""What the training loop, the planner and the benchmarks know of an engine: what runs steps on one kind of device."""

from typing import Callable, Dict, Mapping, Protocol

import numpy as np
import torch

from bert.model.model import Model
from bert.tasks.task import Task

__all__ = ["Arrays", "Engine", "ignore_progress"]

Arrays = Mapping[str, np.ndarray]
"""Rows of a global batch (data/rows.py): all, or those of one process of the run (`part_of`)."""


def ignore_progress(rows: int) -> None:
    """For callers that do not follow a step."""


class Engine(Protocol):
    """Trains a `Model` on one kind of device, in one process of one or many."""

    model: Model
    task: Task
    steps_done: int
    """The last step whose update is in the weights."""
    micro_batch_size: int
    """Rows of one forward pass."""
    steps_per_call: int
    """How many optimizer steps a call of `step` does, on as many global batches in one."""
    asynchronous: bool
    """Whether `step` returns before the device is done: its metrics can be read after `wait_for`."""
    made_up: bool
    """Whether it computes with made-up input, for its speed alone: it has no metrics of the task then, and nothing of
    it is to be saved."""
    rank: int
    """Of this process; 0 writes the run's folder."""
    world_size: int
    """Processes of the run."""
    stops_together: bool
    """Whether all processes of the run stop at the same step, where one is told to stop."""
    sharded: bool
    """Whether `weights` and `optimizer_state` are what this process holds: DTensors, or tensors of its stages alone."""

    def describe(self) -> str:
        """One line for people: precision, micro-batches, and so on."""

    def compile(self) -> None:
        """Compiles what can be compiled ahead of the first step."""

    def expect_rows(self, rows: int) -> None:
        """Says how many rows this process gets of a global batch, about: an engine may cut them more evenly."""

    def step(
        self, batch: Arrays, learning_rate: float, step: int, progress: Callable[[int], None] = ignore_progress
    ) -> Dict[str, torch.Tensor]:
        """Optimizer steps on a global batch, the last of which is `step`; calls `progress(rows)` as rows are done.

        Returns the task's metrics, means over the global batch, and skipped_updates, how many updates were left out so
        far because a gradient was not finite: scalars. Interrupted before the update, it changes nothing.
        """

    def evaluate(self, batch: Arrays) -> Dict[str, torch.Tensor]:
        """The task's metrics on these rows, without dropout and without an update."""

    def predict(self, batch: Arrays) -> np.ndarray:
        """The outputs of the heads of an ExampleTask on these rows, [slots, output_size] float32, without dropout: of
        the slots that the task says, row after row; no slots where another process of a pipeline has them."""

    def wait_for(self, step: int) -> None:
        """Waits until the device is done with `step`."""

    def weights(self) -> Dict[str, torch.Tensor]:
        """Parameter name -> tensor, float32; on the CPU, but where `sharded`."""

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `weights` gives; names that it lacks keep their values."""

    def optimizer_state(self) -> Dict[str, torch.Tensor]:
        """ "<parameter name>.<key>" -> tensor, as `weights` has them; empty before the first step."""

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor], skipped_updates: int) -> None:
        """Takes what `optimizer_state` and `skipped_updates` give. Raises InputError for another optimizer's."""

    def skipped_updates(self) -> int:
        """How many updates were left out because a gradient was not finite."""

    def measure(self, batch: Arrays) -> Dict[str, float]:
        """Seconds of the parts of one step on this batch, waiting for the device after each; what is done stays
        done."""
