"""What the rest of the project knows of a task: what a model learns."""

import math
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Protocol, Sequence, Union, runtime_checkable

import numpy as np

from bert.config import Config, DataConfig
from bert.model.model import Model
from data.examples.examples import Examples, ExampleShape
from data.rows import RowShape, Target
from data.shards import ShardInfo
from data.tokenizer import Vocabulary

__all__ = ["ExampleTask", "Panel", "ShardTask", "Task"]


class Panel(NamedTuple):
    """A part of the loss as people see it: one picture of the curve, a few words in a line of the log."""

    label: str
    """In a line, such as "mlm"."""
    title: str
    """Over the picture, such as "MLM loss"; in nats."""
    loss: str
    """The metric that is the loss."""
    accuracy: str = ""
    """The metric that is the share of right predictions, if there is one."""
    chance: float = math.nan
    """The loss of who guesses without looking, for a line in the picture; none where it is nan."""


class Task(Protocol):
    """A task owns its heads, its fields of a batch, its loss, its metrics and their names
    (bert/tasks/pretraining.py)."""

    targets: Sequence[Target]
    """The fields of a batch beside the model's: positions, labels and weights of each thing that it predicts."""
    metrics: Dict[str, str]
    """Each metric that the heads give, and the field of weights that it is a sum over."""
    panels: Sequence[Panel]
    """The parts of the loss. The loss is the sum of theirs."""
    architecture: str
    """transformers' class of the model with its heads."""
    selected_by: str
    """By what of an evaluation a checkpoint is the best: a loss, the lowest; anything else, the highest."""

    def add_heads(self, model: Model, config: Config) -> None:
        """Appends the heads to `model.blocks`: they make the state's loss, and metrics detached from it."""

    def row_shape(self, data: DataConfig, samples_per_row: int) -> Union[RowShape, ExampleShape]:
        """What a row of a batch holds at most; its `layout` has the fields of a batch."""


@runtime_checkable
class ShardTask(Task, Protocol):
    """A task that learns from shards (data/FORMAT.md)."""

    def check_shards(self, shards: Sequence[ShardInfo]) -> None:
        """Raises InputError that names a shard that it cannot learn from."""


@runtime_checkable
class ExampleTask(Task, Protocol):
    """A task that learns from labelled examples in files of its own kind, and is scored on its own terms."""

    output_slots: str
    """The field of a batch whose slots the heads' outputs [slots, ...] belong to: that of the weights, or
    "sample_ids" for outputs of all tokens. Those of slots with 0 are left out."""
    output_size: int
    """Numbers of each output."""

    def row_shape(self, data: DataConfig, samples_per_row: int) -> ExampleShape: ...

    def read(self, paths: Sequence[str], vocabulary: Vocabulary, data: DataConfig) -> Examples:
        """The examples of files. Raises InputError that names file, line or column, found and expected."""

    def config(self) -> Dict[str, Any]:
        """What config.json says of the heads beside the architecture, such as the labels."""

    def score(self, examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
        """The loss, the metrics of the heads, and those that the task is known by. `outputs` [K or T, output_size]
        float32 are in the order of `examples`."""

    def predictions(self, examples: Examples, outputs: np.ndarray) -> Iterator[Mapping[str, Any]]:
        """What is predicted of each example, an object of predictions.jsonl each."""

    def draw(self, examples: Examples, outputs: np.ndarray, axes: Any) -> None:
        """Draws what is right and wrong into matplotlib's axes: a confusion matrix, or a curve."""
