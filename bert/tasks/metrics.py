"""What tasks are scored by, from scikit-learn and SciPy, and pictures of it."""

import importlib
from typing import Any, Dict, Sequence

import numpy as np

from data.errors import InputError

__all__ = ["draw_confusion", "draw_scatter", "label_config", "library", "of_labels", "of_regression", "softmax"]

MOST_NUMBERS = 20  # labels of a confusion matrix whose cells get their numbers


def library(name: str, package: str) -> Any:
    """A library that scores. Raises InputError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{package} is not installed, which scores this task: pip install {package}")


def label_config(labels: Sequence[str], problem: str = "") -> Dict[str, Any]:
    """What a transformers config.json says of labels; of none, that there is one output."""
    names = list(labels) or ["LABEL_0"]
    return {
        "id2label": {str(number): label for number, label in enumerate(names)},
        "label2id": {label: number for number, label in enumerate(names)},
        **({"problem_type": problem} if problem else {}),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return np.exp(log_softmax(logits))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> Dict[str, float]:
    """The metrics of bert/tasks/heads.py: logits [K, n], labels [K]."""
    loss = float(-log_softmax(logits.astype(np.float64))[np.arange(len(labels)), labels].mean())
    return {"loss": loss, "label_loss": loss, "label_accuracy": float((logits.argmax(axis=1) == labels).mean())}


def of_labels(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dict[str, float]:
    """The loss, the share of right labels, F1 (of the second label where there are two, else the mean over the labels
    that occur), and Matthews' correlation: logits [K, n], labels [K]."""
    score, predicted = library("sklearn.metrics", "scikit-learn"), logits.argmax(axis=1)
    average = "binary" if len(names) == 2 else "macro"
    return {
        **cross_entropy(logits, labels),
        "accuracy": float(score.accuracy_score(labels, predicted)),
        "f1": float(score.f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews_correlation": float(score.matthews_corrcoef(labels, predicted)),
    }


def of_regression(predicted: np.ndarray, labels: np.ndarray) -> Dict[str, float]:
    """The mean of squared errors, and Pearson's and Spearman's correlation, 0 where one of the two is constant."""
    statistics = library("scipy.stats", "scipy")
    loss = float(np.square(predicted.astype(np.float64) - labels).mean())
    constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
    pearson, spearman = statistics.pearsonr, statistics.spearmanr
    return {
        **{"loss": loss, "label_loss": loss},
        "pearson": 0.0 if constant else float(pearson(predicted, labels)[0]),
        "spearman": 0.0 if constant else float(spearman(predicted, labels)[0]),
    }


def draw_confusion(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], axes: Any) -> None:
    """The confusion matrix, each row in shares of its label."""
    counts = library("sklearn.metrics", "scikit-learn").confusion_matrix(labels, predicted, labels=range(len(names)))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) > MOST_NUMBERS:
        return
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour)


def draw_scatter(predicted: np.ndarray, labels: np.ndarray, axes: Any) -> None:
    """Each prediction over its label."""
    axes.plot(labels, predicted, ".", markersize=3)
    axes.axline((float(labels.mean()), float(labels.mean())), slope=1, color="grey", linestyle=":")
    axes.set(xlabel="label", ylabel="predicted")
