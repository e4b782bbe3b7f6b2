"""The choice of one of several endings, as in SWAG.

Parameter names are those of transformers' BertForMultipleChoice.
"""

import math
from typing import Any, Dict, Iterator, Mapping, Sequence

import numpy as np

from bert.config import Config, DataConfig, TaskConfig
from bert.model.model import Model
from bert.tasks.heads import add_label_head
from bert.tasks.metrics import cross_entropy, draw_confusion, softmax
from bert.tasks.task import Panel
from data.examples.choices import read_choices
from data.examples.examples import LABELS, Examples, ExampleShape
from data.examples.records import tokens_of
from data.rows import Target
from data.tokenizer import Vocabulary, make_tokenizer

__all__ = ["MultipleChoice"]


class MultipleChoice:
    """Which of `task.choices` endings goes on from a context. Each ending is a sequence of its own with the context;
    those of an example share a row, and the loss is over what the head says of their [CLS] tokens."""

    targets: Sequence[Target] = (LABELS,)
    architecture = "BertForMultipleChoice"
    output_slots = LABELS.weights

    def __init__(self, config: TaskConfig):
        self.texts, self.label, self.choices = config.text_columns, config.label_column, config.choices
        self.output_size, self.selected_by = config.choices, config.metric or "accuracy"
        panel = Panel("choice", "loss", "label_loss", "label_accuracy", math.log(config.choices))
        self.panels: Sequence[Panel] = (panel,)
        self.metrics = {panel.loss: LABELS.weights, panel.accuracy: LABELS.weights}

    def add_heads(self, model: Model, config: Config) -> None:
        add_label_head(model, config, 1, pools=True)

    def row_shape(self, data: DataConfig, samples_per_row: int) -> ExampleShape:
        tokens = self.choices * data.sequence_length
        return ExampleShape(tokens, samples_per_row, samples_per_row, position=(self.choices,))

    def config(self) -> Dict[str, Any]:
        """Nothing: transformers' class has one output whatever the number of choices."""
        return {}

    def read(self, paths: Sequence[str], vocabulary: Vocabulary, data: DataConfig) -> Examples:
        choices = read_choices(paths, self.choices, self.texts, self.label)
        tokenizer = make_tokenizer(vocabulary)
        tokenizer.enable_truncation(data.sequence_length)
        pairs = [(choice.context, ending) for choice in choices for ending in choice.endings]
        tokens = tokens_of(tokenizer.encode_batch, pairs)
        lengths = tokens.lengths.reshape(-1, self.choices)
        return Examples(
            *(tokens.ids, tokens.types, lengths),
            counts=np.ones(len(choices), np.int64),
            positions=(np.cumsum(lengths, axis=1) - lengths).astype(np.int32),
            labels=np.array([choice.label for choice in choices], np.int32),
            records=choices,
            cut=int(tokens.cut.reshape(-1, self.choices).any(axis=1).sum()),
        )

    def score(self, examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
        metrics = cross_entropy(outputs, examples.labels)
        return {**metrics, "accuracy": metrics["label_accuracy"]}

    def predictions(self, examples: Examples, outputs: np.ndarray) -> Iterator[Mapping[str, Any]]:
        for choice, row in zip(examples.records, outputs):
            yield {
                "context": choice.context,
                "endings": choice.endings,
                "predicted": int(row.argmax()),
                "label": choice.label,
                "probability": round(float(softmax(row).max()), 6),
            }

    def draw(self, examples: Examples, outputs: np.ndarray, axes: Any) -> None:
        """The confusion matrix: whether some place among the endings is preferred."""
        draw_confusion(outputs.argmax(axis=1), examples.labels, list(map(str, range(self.choices))), axes)
