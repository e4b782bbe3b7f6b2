"""How SQuAD scores answers: exact match and F1 (arXiv 1606.05250; 1806.03822 where some questions have no answer), as
shares, not per cent. Names of scores are those of its official script."""

import re
import string
from collections import Counter
from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np

__all__ = ["Answer", "best_threshold", "exact_and_f1", "score_answers"]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(NamedTuple):
    """What is predicted of a question."""

    text: str
    """of the context"""
    score: float
    """of its start and end together, logits"""
    no_answer: float
    """by how much more there is for no answer than for this one"""


def normalize(text: str) -> str:
    """Lower-case, without punctuation and English articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_and_f1(predicted: str, answers: Sequence[str], all_have_one: bool = False) -> Tuple[float, float]:
    """Of the answer that counts as right and is closest; without one nothing, "", is right.

    With `all_have_one` by SQuAD 1.1's script, else by 2.0's. They differ for answers that are normalised to nothing,
    such as "a": 2.0's leaves them out.
    """
    known, found = [normalize(answer) for answer in answers], normalize(predicted)
    if not all_have_one:
        known = [answer for answer in known if answer] or [""]
    nothing = float(not all_have_one)
    return float(found in known), max(f1(found, answer, nothing) for answer in known)


def f1(predicted: str, answer: str, nothing: float) -> float:
    """Of the words that both have; `nothing`, where both are nothing."""
    found, known = predicted.split(), answer.split()
    if not found and not known:
        return nothing
    common = sum((Counter(found) & Counter(known)).values())
    return 2 * common / (len(found) + len(known))


def score_answers(predicted: Sequence[Answer], answers: Sequence[Sequence[str]]) -> Dict[str, float]:
    """exact and f1; where some questions have no answer, one is predicted unless there is more for none, and both are
    given for those questions and for the others, and at the best threshold of `no_answer`."""
    has_answer = np.array([bool(known) for known in answers])
    all_have_one = bool(has_answer.all())
    scores = np.array([exact_and_f1(best.text, known, all_have_one) for best, known in zip(predicted, answers)])
    if all_have_one:
        return dict(zip(("exact", "f1"), scores.mean(axis=0).tolist()))
    differences = np.array([best.no_answer for best in predicted])
    empty = np.array([exact_and_f1("", known) for known in answers])
    decided = np.where(differences[:, None] > 0, empty, scores)
    # At the best threshold the script looks at the text as it is, and none is right only where there is no answer.
    is_empty = np.array([not best.text for best in predicted])
    scores = np.where(has_answer[:, None], scores, is_empty[:, None])
    found: Dict[str, float] = {}
    for place, name in enumerate(("exact", "f1")):
        found[name] = float(decided[:, place].mean())
    for place, name in enumerate(("exact", "f1")):
        for kind, chosen in (("HasAns", has_answer), ("NoAns", ~has_answer)):
            if chosen.any():
                found[f"{kind}_{name}"] = float(decided[chosen, place].mean())
        best, threshold = best_threshold(scores[:, place], (~has_answer).astype(float), differences)
        found.update({f"best_{name}": best, f"best_{name}_thresh": threshold})
    return found


def best_threshold(scores: np.ndarray, empty: np.ndarray, differences: np.ndarray) -> Tuple[float, float]:
    """The highest mean of scores, and the threshold that has it: a prediction [N] counts where its difference is at
    most that, else an empty one does."""
    order = np.argsort(differences, kind="stable")
    sums = np.append(empty.sum(), empty.sum() + np.cumsum((scores - empty)[order]))
    thresholds = np.append(differences.min() - 1, differences[order])
    # Of equal differences only the last is a threshold.
    ends = np.flatnonzero(np.append(np.diff(thresholds) > 0, True))
    best = ends[np.argmax(sums[ends])]
    return float(sums[best] / len(scores)), float(thresholds[best])
