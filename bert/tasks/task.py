"""What the rest of the project knows of a task: what a model learns."""

import math
from typing import Dict, NamedTuple, Protocol, Sequence

from bert.config import Config
from bert.model.model import Model
from data.rows import Target
from data.shards import ShardInfo

__all__ = ["Panel", "Task"]


class Panel(NamedTuple):
    """A part of the loss as people see it: one picture of the curve, a few words in a line of the log."""

    label: str
    """In a line, such as "mlm"."""
    title: str
    """Over the picture, such as "MLM loss"; in nats."""
    loss: str
    """The metric that is the loss."""
    accuracy: str
    """The metric that is the share of right predictions."""
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

    def add_heads(self, model: Model, config: Config) -> None:
        """Appends the heads to `model.blocks`: they make the state's loss, and metrics detached from it."""

    def check_shards(self, shards: Sequence[ShardInfo]) -> None:
        """Raises InputError that names a shard that it cannot learn from."""
