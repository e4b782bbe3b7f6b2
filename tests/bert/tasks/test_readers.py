"""Labelled files of words, questions and choices: what is read of them, as which tokens, and what is refused."""

import json
import random

import numpy as np
import pytest

from data.examples.choices import read_choices
from data.examples.questions import Question, read_questions, windows_of
from data.examples.words import read_sentences
from data.tokenizer import Vocabulary, make_tokenizer
from run_finetuning import main
from tests.bert.tasks.tiny import EXACT, FILES, WORDS, make_bert, open_task


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("form", ["spaces", "tabs", "json lines", "numbers"])
def test_sentences_are_the_same_in_each_form(tmp_path, form):
    words, tags = ["anna", "sees", "the  old\u00a0house"], ["B-PER", "O", "B-LOC"]
    text = {
        "spaces": "-DOCSTART- -X- O\n\n\nanna x B-PER\nsees  x O \n\nrome x O",
        "tabs": "anna\tx\tB-PER\nsees\tx\tO\nthe  old\u00a0house\tx\tB-LOC\n \nrome\tx\tO\n",
        "json lines": json_lines({"tokens": words, "ner_tags": tags}, {"tokens": ["rome"], "ner_tags": ["O"]}),
        "numbers": json_lines({"words": words, "labels": [1, 0, 2]}, {"words": ["rome"], "labels": [0]}),
    }[form]
    first, second = read_sentences([written(tmp_path / f"x.{'jsonl' if '{' in text else 'txt'}", text)], None, None)
    assert first.words == (words[:2] if form == "spaces" else words) and second.words == ["rome"]
    assert first.tags == (["1", "0", "2"] if form == "numbers" else tags[: len(first.words)])


@pytest.mark.parametrize("longest, kept", [(8, "houses bonn"), (7, "houses"), (6, ""), (5, "")])
def test_words_without_a_token_are_predicted_outside_and_long_sentences_end_at_a_word(bert, tmp_path, longest, kept):
    text = "\u200b B-LOC\nrome B-LOC\n\nthe O\nanna B-PER\n\u200b O\noslo B-LOC\nhouses B-LOC\nbonn B-LOC\n"
    path = written(tmp_path / "train.conll", text)
    options = ["--config", "ner.json", "--data.files", path, "--data.sequence_length", str(longest)]
    _, task, examples = open_task(bert, options)
    tokens = " ".join(WORDS[number] for number in examples.input_ids)
    there = f"oslo {kept}".strip().replace("houses", "house ##s")
    assert tokens == f"[CLS] rome [SEP] [CLS] the anna {there} [SEP]"
    assert examples.cut == (longest < 8) and task.labels == ["B-LOC", "B-PER", "O"]
    outputs = np.eye(3, dtype=np.float32)[examples.labels]  # all that is predicted is right
    found = task.tags_of(examples, outputs)
    rest = ["B-LOC" if word in kept.split() else "O" for word in ("houses", "bonn")]
    assert found == [["O", "B-LOC"], ["O", "B-PER", "O", "B-LOC", *rest]]
    scores, missed = task.score(examples, outputs), 1 + rest.count("O")
    assert scores["precision"] == 1 and scores["recall"] == pytest.approx((6 - missed) / 6)
    assert scores["accuracy"] == pytest.approx((8 - missed) / 8) and scores["label_accuracy"] == 1


def test_entities_of_one_kind_without_a_name_are_scored(bert, tmp_path):
    path = written(tmp_path / "train.txt", "anna\tB\nrome \t I\nruns\tO\n")
    _, task, examples = open_task(bert, ["--config", "ner.json", "--data.files", path, "--data.sequence_length", "9"])
    assert task.labels == ["B", "I", "O"] and task.selected_by == "f1"
    assert task.score(examples, np.eye(3, dtype=np.float32)[examples.labels])["f1"] == 1
    assert task.score(examples, np.eye(3, dtype=np.float32)[[0, 2, 2]])["f1"] == 0


def test_labels_that_are_no_iob_tags_are_scored_by_words(bert, tmp_path):
    path = written(tmp_path / "train.tsv", "anna\tNOUN\nruns\tVERB\n")
    _, task, examples = open_task(bert, ["--config", "ner.json", "--data.files", path, "--data.sequence_length", "9"])
    scores = task.score(examples, np.eye(2, dtype=np.float32)[[0, 0]])
    assert task.selected_by == "accuracy" and scores["accuracy"] == 0.5 and "f1" not in scores


def test_choices_are_the_same_in_each_form(tmp_path):
    header = "sent1,sent2,ending0,ending1,label\n"
    forms = {
        "a.csv": header + '"in the house","anna","runs, old","sees",1\n',
        "b.jsonl": json_lines(
            {"context": "in the house", "question": "anna", "choices": ["runs, old", "sees"], "answer": "b"}
        ),
        "c.jsonl": json_lines(
            {"sent1": "in the house", "sent2": "anna", "ending0": "runs, old", "ending1": "sees", "label": 1}
        ),
        "d.jsonl": json_lines({"c": "in the house", "x": "anna runs, old", "y": "anna sees", "label": "1"}),
    }
    for name, text in forms.items():
        columns = ["c", "x", "y"] if name == "d.jsonl" else []
        (choice,) = read_choices([written(tmp_path / name, text)], 2, columns, None)
        assert choice == ("in the house", ["anna runs, old", "anna sees"], 1), name


def questions_of(folder, count, seed):
    folder.mkdir()
    FILES["question_answering"][0](folder, "train", count, random.Random(seed))
    return read_questions([str(folder / "train.json")])


def test_questions_are_the_same_in_each_form(tmp_path):
    questions = questions_of(tmp_path / "squad", 20, 1)
    records = [
        {
            "id": question.id,
            "question": question.text,
            "context": question.context,
            "answers": {"text": question.answers, "answer_start": [question.start] * len(question.answers)},
        }
        for question in questions
    ]
    assert read_questions([written(tmp_path / "x.json", json_lines(*records))]) == questions
    assert read_questions([written(tmp_path / "y.json", json.dumps({"data": records}, indent=1))]) == questions


def test_windows_have_the_answers_tokens_or_point_at_cls(tmp_path):
    """Each window's label against the text that its tokens stand for; each answer is whole in some window."""
    tokenizer, seed = make_tokenizer(Vocabulary(WORDS)), random.randrange(1 << 20)
    print("seed", seed)
    questions = questions_of(tmp_path / "squad", 60, seed)
    windows, cut = windows_of(questions, make_tokenizer(Vocabulary(WORDS)), 24, 5, 6)
    assert cut == sum(len(tokenizer.encode(q.text, add_special_tokens=False)) > 6 for q in questions) > 0
    answered = set()
    for window in windows:
        assert len(window.input_ids) <= 24 and window.input_ids[window.first - 1] == WORDS.index("[SEP]")
        question, (first, last) = window.question, window.label
        covered = [tuple(offsets) for offsets in window.offsets.tolist()]
        whole = tokenizer.encode(question.context, add_special_tokens=False)
        begin = whole.offsets.index(covered[0])
        assert whole.offsets[begin : begin + len(covered)] == covered
        assert whole.ids[begin : begin + len(covered)] == window.input_ids[window.first : -1].tolist()
        if first:
            start, end = covered[first - window.first][0], covered[last - window.first][1]
            assert question.context[start:end] == question.answers[0] and start == question.start
            answered.add(window.number)
        else:
            assert (first, last) == (0, 0)
            inside = [question.start, question.start + len(question.answers[0])] if question.answers else []
            assert not inside or covered[0][0] > inside[0] or covered[-1][1] < inside[1]
    assert answered == {number for number, question in enumerate(questions) if question.answers}


def test_an_answer_of_an_accented_word_without_spaces_is_found_in_the_original_text():
    context = "\u200bThé Höuse、ROME ½ anna"
    words = [*WORDS, "、", "1", "⁄", "2", "##1", "##⁄", "##2", "½"]
    for normalization in ("none", "nfkc"):
        tokenizer = make_tokenizer(Vocabulary(words, normalization=normalization))
        for answer in ("Höuse", "ROME", "½", "anna"):
            question = Question("1", "anna ?", context, [answer], context.index(answer))
            (window,), _ = windows_of([question], tokenizer, 40, 2, 6)
            first, last = (place - window.first for place in window.label)
            assert context[window.offsets[first, 0] : window.offsets[last, 1]] == answer


def test_answers_keep_the_accents_of_decomposed_text():
    context, answer = "the cafe\u0301", "cafe\u0301"
    tokenizer = make_tokenizer(Vocabulary([*WORDS, "cafe"]))
    (window,), _ = windows_of([Question("1", "anna ?", context, [answer], 4)], tokenizer, 40, 2, 6)
    first, last = (place - window.first for place in window.label)
    assert first == last == 1 and context[slice(*window.offsets[1])] == answer


GOOD = {"id": "q7", "question": "anna ?", "context": "the house", "answers": [{"text": "house", "answer_start": 4}]}


@pytest.mark.parametrize(
    "task, name, text, options, expected",
    [
        ("ner", "a.conll", "anna B-PER\nrome\n", [], "line 2 has 1 columns, expected 2 as in the lines before"),
        ("ner", "a.conll", "anna\nrome\n", [], "line 1 has 1 columns, expected at least 2"),
        ("ner", "a.conll", "anna O\nbert X\n", ["--task.label_column", "3"], "expected at least 3"),
        ("ner", "a.conll", "anna O\nbert X\n", ["--task.label_column", "tag"], "expected a number from 1 on"),
        ("ner", "a.conll", "anna O\nbert X\n", ["--task.labels", '["O", "Y"]'], "line 1: word 2: the label is 'X'"),
        ("ner", "a.conll", "anna O\nbert O\n", [], "its tags are O, expected two different names"),
        ("ner", "a.conll", "\u200b O\n\u200b X\n", [], "a.conll: no word has a token"),
        ("ner", "a.conll", "-DOCSTART-\n\n", [], "a.conll: has no sentences"),
        ("ner", "a.jsonl", json_lines({"words": ["a"], "tags": ["O", "X"]}), [], "1 words and 2 tags, expected a tag"),
        ("ner", "a.jsonl", json_lines({"words": "a", "tags": ["O"]}), [], "its words are 'a', expected a list"),
        ("ner", "a.jsonl", json_lines({"words": ["a", "b"], "tags": [0, 1]}), [], "is said by task.labels"),
        ("squad", "a.json", json.dumps({"data": [{"title": 1}]}), [], "a question has no 'id'"),
        ("squad", "a.json", json.dumps({"data": []}), [], "has no questions"),
        ("squad", "a.json", json.dumps({"data": [{"paragraphs": [{"qas": [GOOD]}]}]}), [], "not as SQuAD's (KeyError"),
        ("squad", "a.json", "{\n", [], "line 1 is '{', expected a JSON object"),
        *(
            ("squad", "a.jsonl", json_lines({**GOOD, "answers": [{"text": text, "answer_start": start}]}), [], expected)
            for text, start, expected in (
                ("house", 5, "question q7: the answer 'house' begins at 5, but the context, of 9 characters, has"),
                ("house", 9, "has '' there"),
                ("house", -5, "begins at -5"),
                ("", 0, "begins at 0"),
                ("house", "4", "expected answers, each a text and an answer_start"),
            )
        ),
        ("squad", "a.jsonl", json_lines({**GOOD, "answers": {"text": ["a"], "answer_start": []}}), [], "its answers"),
        ("squad", "a.jsonl", json_lines(GOOD), ["--task.stride", "60"], "task.stride is 60, expected less than 55"),
        ("swag", "a.csv", "sent1,ending0,label\na,b,0\n", [], "expected sent1 or context or article or sent2"),
        ("swag", "a.csv", "sent1,ending0,ending1,label\na,b,c,2\n", [], "row 1: the label is '2'"),
        ("swag", "a.jsonl", json_lines({"context": "a", "choices": ["b"], "label": 0}), [], "1 endings, expected 2"),
        ("swag", "a.jsonl", json_lines({"context": "a", "choices": ["b", None], "label": 0}), [], "has None among"),
        ("swag", "a.csv", "x,y,label\na,b,0\n", ["--task.text_columns", '["x", "y"]'], "names 2 columns, expected"),
        ("swag", "a.csv", "c,x,y,label\na,b,d,2\n", ["--task.text_columns", '["c", "x", "y"]'], "label is '2'"),
        ("swag", "a.csv", "x\na\n", ["--task.text_columns", '["1", "2", "3", "4", "5"]'], "expected a context"),
        ("squad", "a.jsonl", json_lines(GOOD), ["--task.text_columns", '["q"]'], "expected none, as files of"),
        ("ner", "a.conll", "a O\nb X\n", ["--task.text_columns", '["1", "2"]'], "expected one column"),
        ("swag", "a.csv", "x,y,label\na,b,0\n", ["--task.choices", "1"], "task.choices is 1, expected two or more"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_learned_from_are_refused_in_one_message(
    bert, tmp_path, capsys, task, name, text, options, expected
):
    path, run = written(tmp_path / name, text), str(tmp_path / "run")
    own = ["--data.files", path, "--data.sequence_length", "64", "--task.max_question_tokens", "6"]
    own += ["--task.stride", "9", "--task.choices", "2", "--training.output", run, "--model", bert, *EXACT, *options]
    assert main(["--config", f"{task}.json", *own]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_that_is_missing_is_named(bert, tmp_path, capsys):
    own = ["--data.files", str(tmp_path / "none-*.conll"), "--model", bert, "--data.sequence_length", "9"]
    assert main(["--config", "ner.json", *own]) == 2
    assert "none-*.conll: no such file" in capsys.readouterr().err
