"""Classification of texts or pairs of texts, and regression: GLUE's tasks, and any file with named columns.

Parameter names are those of transformers' BertForSequenceClassification.
"""

import logging
import math
from typing import Any, Dict, Iterator, List, Mapping, Sequence

import numpy as np

from bert.config import Config, DataConfig, TaskConfig
from bert.model.model import Model
from bert.tasks.heads import add_label_head
from bert.tasks.metrics import draw_confusion, draw_scatter, label_config, of_labels, of_regression, softmax
from bert.tasks.task import Panel
from data.errors import InputError
from data.examples.examples import LABELS, Examples, ExampleShape
from data.examples.glue import GLUE
from data.examples.records import Record, label_numbers, read_records, tokens_of
from data.rows import Target
from data.tokenizer import Vocabulary, make_tokenizer

__all__ = ["Classification"]

logger = logging.getLogger(__name__)


class Classification:
    """One label of `task.labels` for each text or pair; without labels, a number (regression)."""

    targets: Sequence[Target] = (LABELS,)
    architecture = "BertForSequenceClassification"
    output_slots = LABELS.weights

    def __init__(self, config: TaskConfig):
        glue = GLUE[config.glue] if config.glue else None
        self.texts = [(name,) for name in config.text_columns] or (glue.texts if glue else [("text",)])
        self.label = (config.label_column,) if config.label_column else glue.label if glue else ("label",)
        self.header = glue.header if glue else ()
        self.skips = glue is not None  # a few rows of QQP are broken
        self.regression = config.regression or (glue is not None and not glue.labels)
        self.labels: List[str] = [] if self.regression else list(config.labels)
        self.output_size = max(1, len(self.labels))
        self.selected_by = config.metric or (glue.metric if glue else "pearson" if self.regression else "accuracy")
        # In nats; of a regression, in squares of its unit.
        chance = math.log(self.output_size) if self.labels else math.nan
        panel = Panel("labels", "loss", "label_loss", "" if self.regression else "label_accuracy", chance)
        self.panels: Sequence[Panel] = (panel,)
        self.metrics = {name: LABELS.weights for name in (panel.loss, panel.accuracy) if name}

    @staticmethod
    def find_labels(config: Config) -> List[str]:
        """The labels of a config that says none: GLUE's, or those of data.files in alphabetical order."""
        task = Classification(config.task)
        if task.regression or config.task.labels:
            return list(config.task.labels)
        if config.task.glue:
            return list(GLUE[config.task.glue].labels)
        found = {str(record.values["label"]) for record in read_records(config.data.files, {"label": task.label})}
        if not 1 < len(found) <= MOST_LABELS:
            raise InputError(
                f"{config.data.files[0]}: {len(found)} different values are in the column {task.label[0]!r}, such as "
                f"{', '.join(sorted(found)[:3])}; expected 2 to {MOST_LABELS} labels. For numbers set task.regression"
            )
        return sorted(found)

    def add_heads(self, model: Model, config: Config) -> None:
        add_label_head(model, config, self.output_size, pools=True)

    def row_shape(self, data: DataConfig, samples_per_row: int) -> ExampleShape:
        label_type = np.float32 if self.regression else np.int32
        return ExampleShape(data.sequence_length, samples_per_row, samples_per_row, label_type=label_type)

    def config(self) -> Dict[str, Any]:
        return label_config(self.labels, "regression" if self.regression else "single_label_classification")

    def read(self, paths: Sequence[str], vocabulary: Vocabulary, data: DataConfig) -> Examples:
        columns = {f"text{number}": names for number, names in enumerate(self.texts)}
        broken: List[str] = []
        asked = {**columns, "label": self.label}
        records = read_records(paths, asked, self.header, broken if self.skips else None)
        if broken:
            logger.warning(
                f"{broken[0]}: has not the columns of the first line; {len(broken):,} such rows are left out"
            )
        tokenizer = make_tokenizer(vocabulary)
        tokenizer.enable_truncation(data.sequence_length)
        texts: List[Any] = [tuple(str(record.values[key]) for key in columns) for record in records]
        tokens = tokens_of(tokenizer.encode_batch, texts if len(columns) > 1 else [text for (text,) in texts])
        return Examples(
            *(tokens.ids, tokens.types, tokens.lengths[:, None]),
            counts=np.ones(len(records), np.int64),
            positions=np.zeros(len(records), np.int32),
            labels=self.labels_of(records),
            records=texts,
            cut=int(tokens.cut.sum()),
        )

    def labels_of(self, records: Sequence[Record]) -> np.ndarray:
        if self.regression:
            return np.array([number(record) for record in records], np.float32)
        values = [str(record.values["label"]) for record in records]
        return label_numbers(values, self.labels, lambda index: records[index].place)

    def score(self, examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
        if self.regression:
            return of_regression(outputs[:, 0], examples.labels)
        return of_labels(outputs, examples.labels, self.labels)

    def predictions(self, examples: Examples, outputs: np.ndarray) -> Iterator[Mapping[str, Any]]:
        for texts, label, row in zip(examples.records, examples.labels, outputs):
            if self.regression:
                yield {"texts": texts, "predicted": float(row[0]), "label": float(label)}
            else:
                best, shares = int(row.argmax()), softmax(row)
                yield {
                    "texts": texts,
                    "predicted": self.labels[best],
                    "label": self.labels[label],
                    "probability": round(float(shares[best]), 6),
                }

    def draw(self, examples: Examples, outputs: np.ndarray, axes: Any) -> None:
        if self.regression:
            draw_scatter(outputs[:, 0], examples.labels, axes)
        else:
            draw_confusion(outputs.argmax(axis=1), examples.labels, self.labels, axes)


MOST_LABELS = 1000


def number(record: Record) -> float:
    """The label of a regression."""
    try:
        value = float(record.values["label"])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{record.place}: the label is {record.values['label']!r}, expected a number")
    return value
