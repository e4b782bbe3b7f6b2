"""A label for each word of a sentence: names of people and places (NER), parts of speech.

Parameter names are those of transformers' BertForTokenClassification.
"""

import math
import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np

from bert.config import Config, DataConfig, TaskConfig
from bert.model.model import Model
from bert.tasks.heads import add_label_head
from bert.tasks.metrics import cross_entropy, draw_confusion, label_config, library
from bert.tasks.task import Panel
from data.errors import InputError
from data.examples.examples import LABELS, Examples, ExampleShape
from data.examples.records import join, label_numbers
from data.examples.words import Sentence, pieces_of, read_sentences
from data.rows import Target
from data.tokenizer import Vocabulary, make_tokenizer

__all__ = ["TokenClassification"]

OUTSIDE = "O"
IOB = re.compile(r"[BIES](-.+)?|O")  # IOB1, IOB2 and IOBES, with kinds or without, as seqeval reads them
CHUNK = 1000  # sentences that are tokenized at a time


class Tagged(NamedTuple):
    """A sentence as it is scored."""

    sentence: Sentence
    tags: List[str]
    """of each word, as `task.labels` names them"""
    predicted: np.ndarray
    """[K] the words that a label is predicted for"""


class TokenClassification:
    """One label of `task.labels` for each word, learned and predicted at its first token; the loss is the mean over
    these.

    Words that have no token, for they are cut off or normalised to nothing, have no prediction. In the scores they
    count as predicted O: what is named there is missed. Where all labels are IOB tags, entities are scored, else words.
    """

    targets: Sequence[Target] = (LABELS,)
    architecture = "BertForTokenClassification"
    output_slots = LABELS.weights

    def __init__(self, config: TaskConfig):
        self.words = config.text_columns[0] if config.text_columns else None
        self.tags, self.labels = config.label_column, list(config.labels)
        self.output_size = max(1, len(self.labels))
        self.has_entities = all(map(IOB.fullmatch, self.labels))
        self.selected_by = config.metric or ("f1" if self.has_entities else "accuracy")
        panel = Panel("labels", "loss", "label_loss", "label_accuracy", math.log(self.output_size))
        self.panels: Sequence[Panel] = (panel,)
        self.metrics = {panel.loss: LABELS.weights, panel.accuracy: LABELS.weights}

    @staticmethod
    def find_labels(config: Config) -> List[str]:
        """The tags in data.files, in alphabetical order."""
        task = TokenClassification(config.task)
        sentences = read_sentences(config.data.files, task.words, task.tags)
        found = sorted({tag for sentence in sentences for tag in sentence.tags})
        if len(found) < 2 or all(map(str.isdigit, found)):
            raise InputError(
                f"{config.data.files[0]}: its tags are {', '.join(found[:5])}, expected two different names or more. "
                "What tags that are numbers stand for is said by task.labels; which column they are in, by "
                "task.label_column"
            )
        return found

    def add_heads(self, model: Model, config: Config) -> None:
        add_label_head(model, config, self.output_size, pools=False)

    def row_shape(self, data: DataConfig, samples_per_row: int) -> ExampleShape:
        return ExampleShape(data.sequence_length, data.sequence_length, samples_per_row)

    def config(self) -> Dict[str, Any]:
        return label_config(self.labels)

    def read(self, paths: Sequence[str], vocabulary: Vocabulary, data: DataConfig) -> Examples:
        sentences = read_sentences(paths, self.words, self.tags)
        tags = [
            (f"{sentence.place}: word {word}", tag)
            for sentence in sentences
            for word, tag in enumerate(sentence.tags, 1)
        ]
        numbers = label_numbers([tag for _, tag in tags], self.labels, lambda index: tags[index][0])
        tokenizer = make_tokenizer(vocabulary)
        pieces = [
            pieces_of(encoding, data.sequence_length)
            for first in range(0, len(sentences), CHUNK)
            for encoding in tokenizer.encode_batch(
                [sentence.words for sentence in sentences[first : first + CHUNK]], is_pretokenized=True
            )
        ]
        if not any(len(piece.words) for piece in pieces):
            raise InputError(f"{paths[0]}: no word has a token; expected words that the tokenizer leaves something of")
        ends = np.cumsum([len(sentence.words) for sentence in sentences])
        labels = np.split(numbers, ends[:-1])  # of each sentence
        ids = join([piece.ids for piece in pieces])
        return Examples(
            ids,
            np.zeros_like(ids),
            sequence_lengths=np.array([[len(piece.ids)] for piece in pieces], np.int64),
            counts=np.array([len(piece.words) for piece in pieces], np.int64),
            positions=np.concatenate([piece.firsts for piece in pieces]).astype(np.int32),
            labels=np.concatenate([own[piece.words] for own, piece in zip(labels, pieces)]),
            records=[
                Tagged(sentence, [self.labels[label] for label in own], piece.words)
                for sentence, own, piece in zip(sentences, labels, pieces)
            ],
            cut=sum(piece.cut for piece in pieces),
        )

    def tags_of(self, examples: Examples, outputs: np.ndarray) -> List[List[str]]:
        """The tags predicted of each sentence's words."""
        found = []
        for record, labels in zip(examples.records, np.split(outputs.argmax(axis=1), np.cumsum(examples.counts)[:-1])):
            tags = [OUTSIDE] * len(record.tags)
            for word, label in zip(record.predicted, labels):
                tags[word] = self.labels[label]
            found.append(tags)
        return found

    def score(self, examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
        """Of entities as conlleval has it: one is right where its words and its kind are."""
        scores = library("seqeval.metrics.sequence_labeling", "seqeval")
        expected, found = [record.tags for record in examples.records], self.tags_of(examples, outputs)
        metrics = {
            **cross_entropy(outputs, examples.labels),
            "accuracy": float(scores.accuracy_score(expected, found)),
        }
        if self.has_entities:
            of_entities = scores.precision_recall_fscore_support(expected, found, average="micro", zero_division=0)
            metrics.update(zip(("precision", "recall", "f1"), map(float, of_entities)))
        return metrics

    def predictions(self, examples: Examples, outputs: np.ndarray) -> Iterator[Mapping[str, Any]]:
        for record, tags in zip(examples.records, self.tags_of(examples, outputs)):
            yield {"words": record.sentence.words, "predicted": tags, "labels": record.tags}

    def draw(self, examples: Examples, outputs: np.ndarray, axes: Any) -> None:
        """The confusion matrix of words."""
        draw_confusion(outputs.argmax(axis=1), examples.labels, self.labels, axes)
