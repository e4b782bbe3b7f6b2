"""Answers as spans of a context: SQuAD 1.1, and 2.0 with questions that have no answer.

Parameter names are those of transformers' BertForQuestionAnswering.

Shape letters: R rows, L token slots of a row, P prediction slots of a row, H hidden; T tokens, K windows, W tokens of a
window at most. The last dimension, 2, is an answer's first token and its last.
"""

import itertools
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from bert.config import Config, DataConfig, TaskConfig
from bert.model.batch import State
from bert.model.model import Model
from bert.tasks.heads import with_loss
from bert.tasks.metrics import library
from bert.tasks.squad import Answer, exact_and_f1, score_answers
from bert.tasks.task import Panel
from data.examples.examples import LABELS, Examples, ExampleShape
from data.examples.questions import Question, Window, read_questions, windows_of
from data.rows import Target
from data.tokenizer import Vocabulary, make_tokenizer
from ops.attention import CuSeqlens, SampleIds
from ops.gather import gather_tokens

__all__ = ["QuestionAnswering", "QuestionHead"]

LOWEST = torch.finfo(torch.float32).min  # its softmax is exactly 0
Fields = Mapping[str, torch.Tensor]

WORDS = (1, 2, 3, 4, 5, 10)  # answers of so many words and more, up to the next, are one bar of the picture


class QuestionAnswering:
    """The first token and the last of an answer in each window of a context; [CLS] where it has none.

    The loss is the mean of the cross-entropies of both, each over the tokens of one window. Of all windows of a
    question the best answer counts, of up to `task.max_answer_tokens` tokens of the context, and it is a slice of the
    context's own text.
    """

    targets: Sequence[Target] = (LABELS,)
    architecture = "BertForQuestionAnswering"
    output_slots, output_size = "sample_ids", 2

    def __init__(self, config: TaskConfig):
        self.stride, self.question_tokens = config.stride, config.max_question_tokens
        self.answer_tokens, self.selected_by = config.max_answer_tokens, config.metric or "f1"
        panel = Panel("span", "loss", "span_loss", "span_accuracy")
        self.panels: Sequence[Panel] = (panel,)
        self.metrics = {panel.loss: LABELS.weights, panel.accuracy: LABELS.weights}

    def add_heads(self, model: Model, config: Config) -> None:
        model.qa_outputs = nn.Linear(config.model.hidden_size, 2)
        model.head = QuestionHead(model.qa_outputs)
        model.blocks.append(("heads", model.head))

    def row_shape(self, data: DataConfig, samples_per_row: int) -> ExampleShape:
        return ExampleShape(data.sequence_length, samples_per_row, samples_per_row, label=(2,))

    def config(self) -> Dict[str, Any]:
        """Nothing: there are two outputs, as transformers takes for granted."""
        return {}

    def read(self, paths: Sequence[str], vocabulary: Vocabulary, data: DataConfig) -> Examples:
        """An example is a window."""
        limits = data.sequence_length, self.stride, self.question_tokens
        windows, cut = windows_of(read_questions(paths), make_tokenizer(vocabulary), *limits)
        return Examples(
            np.concatenate([window.input_ids for window in windows]),
            np.concatenate([window.token_type_ids for window in windows]),
            sequence_lengths=np.array([[len(window.input_ids)] for window in windows], np.int64),
            counts=np.ones(len(windows), np.int64),
            positions=np.zeros(len(windows), np.int32),
            labels=np.array([window.label for window in windows], np.int32),
            records=windows,
            cut=cut,
        )

    def answers(self, examples: Examples, outputs: np.ndarray) -> List[Tuple[Question, Answer]]:
        """The best answer to each question."""
        ends = np.cumsum(examples.lengths)
        found = []
        windows = zip(examples.records, np.split(outputs, ends[:-1]))
        for _, group in itertools.groupby(windows, lambda item: item[0].number):
            parts = list(group)
            nothing = min(float(logits[0].sum()) for _, logits in parts)
            score, (start, end) = max(
                (best_span(window, logits, self.answer_tokens) for window, logits in parts), key=lambda best: best[0]
            )
            question = parts[0][0].question
            found.append((question, Answer(question.context[start:end], score, nothing - score)))
        return found

    def score(self, examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
        answers = self.answers(examples, outputs)
        scores = score_answers([answer for _, answer in answers], [question.answers for question, _ in answers])
        return {**span_loss(examples, outputs), **scores}

    def predictions(self, examples: Examples, outputs: np.ndarray) -> Iterator[Mapping[str, Any]]:
        """Where questions may have no answer, one is predicted unless there is more for none."""
        answers = self.answers(examples, outputs)
        may_be_none = not all(question.answers for question, _ in answers)
        for question, answer in answers:
            yield {
                "id": question.id,
                "question": question.text,
                "predicted": "" if may_be_none and answer.no_answer > 0 else answer.text,
                "answers": question.answers,
                "score": round(answer.score, 6),
                **({"best": answer.text, "no_answer": round(answer.no_answer, 6)} if may_be_none else {}),
            }

    def draw(self, examples: Examples, outputs: np.ndarray, axes: Any) -> None:
        """Precision and recall of no answer, where some questions have none; else exact match and F1 by the answer's
        words."""
        answers = self.answers(examples, outputs)
        if not all(question.answers for question, _ in answers):
            curve = library("sklearn.metrics", "scikit-learn").precision_recall_curve
            none = [not question.answers for question, _ in answers]
            precision, recall, _ = curve(none, [answer.no_answer for _, answer in answers])
            axes.plot(recall, precision)
            axes.set(xlabel="recall of no answer", ylabel="precision of no answer", xlim=(0, 1), ylim=(0, 1.02))
            return
        scores = np.array([exact_and_f1(answer.text, question.answers) for question, answer in answers])
        words = np.array([len(question.answers[0].split()) for question, _ in answers])
        bars = np.maximum(0, np.searchsorted(WORDS, words, "right") - 1)
        for place, name in enumerate(("exact match", "F1")):
            means = [scores[bars == bar, place].mean() if (bars == bar).any() else 0 for bar in range(len(WORDS))]
            axes.bar(np.arange(len(WORDS)) + 0.4 * place - 0.2, means, 0.4, label=name)
        axes.set_xticks(range(len(WORDS)), [*map(str, WORDS[:4]), "5-9", "10+"])
        axes.set(xlabel="words of the answer", ylim=(0, 1))
        axes.legend()


def best_span(window: Window, logits: np.ndarray, most: int) -> Tuple[float, Tuple[int, int]]:
    """The score of the best answer of up to `most` tokens in a window with logits [tokens, 2], and the characters of
    the context from and up to which it goes."""
    count = len(window.offsets)
    if not count:
        return float(np.finfo(np.float32).min), (0, 0)
    starts, ends = logits[window.first : window.first + count].T.astype(np.float64)
    scores = starts[:, None] + sliding_window_view(np.append(ends, np.full(most - 1, -np.inf)), most)
    first, more = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, more]), (int(window.offsets[first, 0]), int(window.offsets[first + more, 1]))


def span_loss(examples: Examples, outputs: np.ndarray) -> Dict[str, float]:
    """The metrics of the head: outputs [T, 2]."""
    lengths, logits = examples.lengths, outputs.astype(np.float64)
    starts = np.cumsum(lengths) - lengths
    highest = np.maximum.reduceat(logits, starts)
    sums = np.add.reduceat(np.exp(logits - np.repeat(highest, lengths, axis=0)), starts)
    right = np.stack([logits[starts + place, side] for side, place in enumerate(examples.labels.T)], axis=1)
    loss = float((highest + np.log(sums) - right).mean())
    accuracy = float((right == highest).all(axis=1).mean())
    return {"loss": loss, "span_loss": loss, "span_accuracy": accuracy}


class QuestionHead(nn.Module):
    """The last block: a linear layer to two logits of each token, and the loss of K windows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.shared = (layer,)  # a tuple, for it stands under another name in the model

    def forward(self, state: State) -> State:
        logits = self.shared[0](state.hidden).float()
        segments, fields = state.batch.segments, state.batch.targets
        if isinstance(segments, CuSeqlens):
            windows, labels = of_unpadded(logits, fields, segments)
        else:
            assert isinstance(segments, SampleIds)
            windows, labels = of_rows(logits, fields, segments)
        weights = fields["weights"].flatten()
        losses = F.cross_entropy(windows, labels.long(), reduction="none").reshape(-1, 2)
        right = (windows.argmax(dim=-1) == labels).float().reshape(-1, 2)
        metrics = {
            "span_loss": (weights * losses.mean(dim=-1)).sum(),
            "span_accuracy": (weights * right[:, 0] * right[:, 1]).sum(),
        }
        return with_loss(state, metrics, logits.flatten(0, -2), self.training)


def of_unpadded(logits: torch.Tensor, fields: Fields, segments: CuSeqlens) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, 2] as those of each window, [K 2, W], lowest beyond its end, and the labels [K 2] among these."""
    starts, ends = fields["positions"], segments.cu_seqlens
    ends = ends[torch.searchsorted(ends, starts, right=True)]
    places = starts[:, None] + torch.arange(segments.max_seqlen, device=logits.device)
    windows = logits.index_select(0, places.clamp(max=len(logits) - 1).flatten()).unflatten(0, places.shape)
    windows = windows.masked_fill((places >= ends[:, None])[..., None], LOWEST)
    return windows.transpose(1, 2).flatten(0, 1), fields["labels"].flatten()


def of_rows(logits: torch.Tensor, fields: Fields, segments: SampleIds) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same of rows [R, L, 2]: [R P 2, L], lowest at the tokens of other windows, and labels [R P 2]."""
    ids, positions = segments.ids.float(), fields["positions"]
    own = gather_tokens(ids[..., None], positions)  # [R, P, 1]
    others = (ids[:, None] != own)[:, :, None]
    rows, slots, _, length = others.shape
    windows = logits.transpose(1, 2)[:, None].expand(rows, slots, 2, length).masked_fill(others, LOWEST)
    return windows.flatten(0, 2), (positions[..., None] + fields["labels"]).flatten()
