"""Answers of several windows, and their scores, beside plain twins: of transformers' run_qa, of SQuAD's script."""

import collections
import dataclasses
import random
import re
import string

import numpy as np
import pytest
from matplotlib.figure import Figure

from bert.tasks.squad import Answer, best_threshold, exact_and_f1, score_answers
from tests.bert.tasks.tiny import make_bert, make_files, open_task


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    bert = make_bert(tmp_path_factory.mktemp("bert"))
    _, task, examples = open_task(bert, make_files("question_answering", tmp_path_factory.mktemp("files"), seed=5))
    return task, examples


def answers_of_run_qa(task, examples, outputs):
    """Every pair of a start and an end, in order, as postprocess_qa_predictions looks at them, with an n-best that is
    long enough: id -> (text, its score, the difference to no answer's)."""
    found = {}
    ends = np.cumsum(examples.lengths)
    for window, logits in zip(examples.records, np.split(outputs, ends[:-1])):
        null, best = found.get(window.question.id, (np.inf, (-np.inf, "")))
        null = min(null, float(logits[0, 0] + logits[0, 1]))
        offsets = [None] * window.first + window.offsets.tolist() + [None]
        for start in range(len(logits)):
            for end in range(start, min(len(logits), start + task.answer_tokens)):
                if offsets[start] is not None and offsets[end] is not None:
                    score = float(logits[start, 0]) + float(logits[end, 1])
                    if score > best[0]:
                        best = score, window.question.context[offsets[start][0] : offsets[end][1]]
        found[window.question.id] = null, best
    return {key: (text, score, null - score) for key, (null, (score, text)) in found.items()}


def test_the_best_answer_over_all_windows_is_run_qas(opened):
    task, examples = opened
    outputs = np.random.default_rng().normal(size=(examples.lengths.sum(), 2)).astype(np.float32)
    found = {question.id: tuple(answer) for question, answer in task.answers(examples, outputs)}
    expected = answers_of_run_qa(task, examples, outputs)
    assert found.keys() == expected.keys() and len(found) == 60 < len(examples)
    for key, (text, score, difference) in expected.items():
        assert found[key] == (text, pytest.approx(score, rel=1e-5), pytest.approx(difference, rel=1e-4, abs=1e-5))


def test_outputs_that_say_the_labels_score_1_and_predict_none_where_there_is_none(opened):
    task, examples = opened
    outputs = np.zeros((examples.lengths.sum(), 2), np.float32)
    starts = np.cumsum(examples.lengths) - examples.lengths
    for side in (0, 1):
        outputs[starts + examples.labels[:, side], side] = 20
    nowhere = (examples.labels == 0).all(axis=1)
    answered = {window.number for window, none in zip(examples.records, nowhere) if not none}
    for window, start in zip(examples.records, starts):  # the windows of an answer that do not have it say nothing
        if window.number in answered and window.label == (0, 0):
            outputs[start] = 0
    scores = task.score(examples, outputs)
    names = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1")
    assert all(scores[name] == 1 for name in names)
    for line in task.predictions(examples, outputs):
        assert line["predicted"] == (line["answers"][0] if line["answers"] else "")


def test_squad_1_is_drawn_by_the_answers_words(opened):
    task, examples = opened
    windows = [window for window in examples.records if window.question.answers]
    lengths = np.array([[len(window.input_ids)] for window in windows])
    answered = dataclasses.replace(examples, records=windows, sequence_lengths=lengths)
    axes = Figure().subplots()
    outputs = np.random.default_rng().normal(size=(lengths.sum(), 2))
    task.draw(answered, outputs, axes)
    exact, f1 = axes.containers
    answers = [(answer.text, question.answers) for question, answer in task.answers(answered, outputs)]
    assert f1[0].get_height() == pytest.approx(np.mean([exact_and_f1(*pair)[1] for pair in answers]))
    assert [bar.get_height() for bar in exact[1:]] == [0] * 5  # all answers are of one word


def normalized(text):
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(answer, found, version):
    answer, found = normalized(answer).split(), normalized(found).split()
    same = sum((collections.Counter(answer) & collections.Counter(found)).values())
    if version == 2 and (not answer or not found):
        return int(answer == found)
    if not same:
        return 0
    precision, recall = same / len(found), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def official(predicted, answers):
    """SQuAD's evaluate-v1.1.py, or where a question has no answer its evaluate-v2.0.py with --na-prob-file."""

    def exact(one, text):
        return float(normalized(one) == normalized(text))

    if all(answers):
        pairs = list(zip(predicted, answers))
        f1s = [max(official_f1(one, best.text, 1) for one in known) for best, known in pairs]
        return {
            "exact": np.mean([max(exact(o, best.text) for o in known) for best, known in pairs]),
            "f1": np.mean(f1s),
        }
    known = [[one for one in own if normalized(one)] or [""] for own in answers]
    found = {}
    for name, score in (("exact", exact), ("f1", lambda one, text: official_f1(one, text, 2))):
        texts = ["" if best.no_answer > 0 else best.text for best in predicted]
        scores = np.array([max(score(one, text) for one in own) for own, text in zip(known, texts)])
        found[name] = scores.mean()
        for kind, chosen in (("HasAns", [bool(own) for own in answers]), ("NoAns", [not own for own in answers])):
            if any(chosen):
                found[f"{kind}_{name}"] = scores[chosen].mean()
        scores = [max(score(one, best.text) for one in own) for own, best in zip(known, predicted)]
        best_sum = current = sum(not own for own in answers)
        for place in np.argsort([best.no_answer for best in predicted]):
            current += scores[place] if answers[place] else -1 if predicted[place].text else 0
            best_sum = max(best_sum, current)
        found[f"best_{name}"] = best_sum / len(answers)
    return found


def test_scores_are_the_official_scripts():
    rng = random.Random()
    words = ["The", "a", "an", "cat", "cat.", "Cat-dog", "Höhle", "¿qué?", "half-life", "'", "U.S."]

    def text(least):
        return " ".join(rng.choices(words, k=rng.randint(least, 3)))

    for _ in range(300):
        least = rng.randint(0, 1)
        answers = [[text(1) for _ in range(rng.randint(least, 3))] for _ in range(rng.randint(1, 8))]
        predicted = [Answer(text(0), 0.0, rng.gauss(0, 1)) for _ in answers]
        found = score_answers(predicted, answers)
        assert {name: value for name, value in found.items() if "thresh" not in name} == pytest.approx(
            official(predicted, answers)
        )


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng()
    for _ in range(50):
        count = rng.integers(1, 12)
        scores, empty = rng.random(count) * rng.integers(0, 2, count), rng.integers(0, 2, count).astype(float)
        differences = rng.integers(-3, 4, count).astype(float)
        best, threshold = best_threshold(scores, empty, differences)
        means = [np.where(differences <= at, scores, empty).mean() for at in range(-5, 5)]
        assert best == pytest.approx(max(means))
        assert np.where(differences <= threshold, scores, empty).mean() == pytest.approx(best)


def test_squad_1_has_no_scores_of_no_answer():
    answers = [Answer("the cat", 3.0, 5.0), Answer("dog", 2.0, -1.0)]
    assert score_answers(answers, [["cat"], ["a dog house"]]) == {"exact": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}
    scores = score_answers(answers, [["cat"], []])
    assert (scores["exact"], scores["HasAns_f1"], scores["NoAns_f1"]) == (0, 0, 0)  # none where the cat is, and a dog
    assert scores["best_exact"] == 0.5
