"""Questions on contexts: SQuAD's JSON, and JSON lines and parquet as the Hugging Face hub has it; and the windows of
tokens that long contexts are read in.

Characters are those of Python's strings, which is how SQuAD counts.
"""

import json
import unicodedata
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.errors import InputError
from data.examples.records import read_records, stem_and_ending
from data.preparing.text_file import read_text

__all__ = ["Question", "Window", "read_questions", "windows_of"]

COLUMNS = {name: (name,) for name in ("id", "question", "context", "answers")}
CHUNK = 1000  # questions that are tokenized at a time


class Question(NamedTuple):
    id: str
    text: str
    context: str
    answers: List[str]
    """all that count as right; none where the context has no answer"""
    start: int
    """the character of the context at which the first of them begins"""


class Window(NamedTuple):
    """A part of a context, with its question before it."""

    number: int
    """of its question among all"""
    question: Question
    input_ids: np.ndarray
    """[tokens] int32, as the next"""
    token_type_ids: np.ndarray
    first: int
    """the place of the first token of the context"""
    offsets: np.ndarray
    """[n, 2] int32, the characters of the context from and up to which each of its tokens goes, with the marks after it
    that the tokenizer leaves out"""
    label: Tuple[int, int]
    """the places of the answer's first token and of its last; those of [CLS] where it is not all in here"""


def read_questions(paths: Sequence[str]) -> List[Question]:
    """The questions of all files. Raises InputError that names the file, and the question whose answer is not in its
    context where it says."""
    questions: List[Question] = []
    for path in paths:
        articles = articles_of(path)
        records = read_records([path], COLUMNS) if articles is None else records_of(path, articles)
        questions += [question_of(place, values) for place, values in records]
    return questions


def articles_of(path: str) -> Optional[List[Any]]:
    """What is in "data" of SQuAD's JSON; None of other files."""
    if stem_and_ending(path)[1] != ".json":
        return None
    try:
        whole = json.loads("".join(read_text(path, lambda count: None, cut_long=False)))
    except ValueError:  # JSON lines
        return None
    return whole.get("data") if isinstance(whole, dict) else None


def records_of(path: str, articles: List[Any]) -> List[Tuple[str, Mapping[str, Any]]]:
    """(where it is, its values) of each question of SQuAD's articles, or of a list of questions in their place."""
    try:
        nested = [paragraph for article in articles for paragraph in article.get("paragraphs", ())]
        found = [{**question, "context": each["context"]} for each in nested for question in each["qas"]]
        found += [article for article in articles if "paragraphs" not in article]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is not as SQuAD's ({type(error).__name__}: {error}). Expected data, a list of articles with "
            "paragraphs, each with a context and with qas, a list of questions; or JSON lines"
        )
    if not found:
        raise InputError(f"{path}: has no questions; expected them in data, paragraphs, qas")
    return [(path, question) for question in found]


def question_of(place: str, values: Mapping[str, Any]) -> Question:
    missing = [name for name in COLUMNS if values.get(name) is None]
    if missing:
        raise InputError(f"{place}: a question has no {missing[0]!r}; found {', '.join(map(repr, values))}")
    name, context, answers = str(values["id"]), str(values["context"]), values["answers"]
    try:
        if isinstance(answers, list):
            answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
        pairs = list(zip(answers["text"], answers["answer_start"]))
        if len(answers["text"]) != len(answers["answer_start"]):
            raise ValueError
        wrong = [pair for pair in pairs if not pair[0].strip() or pair[1] < 0 or not context.startswith(*pair)]
    except (AttributeError, KeyError, TypeError, ValueError):
        expected = "answers, each a text and an answer_start, a character's number; none where there is no answer"
        raise InputError(f"{place}: question {name}: its answers are {str(answers)[:60]}, expected {expected}")
    for text, start in wrong:
        there = f"the context, of {len(context)} characters, has {context[max(0, start) :][: len(text)]!r} there"
        raise InputError(
            f"{place}: question {name}: the answer {text!r} begins at {start}, but {there}. answer_start counts "
            "characters from 0 on, not bytes, in the context as it is"
        )
    return Question(name, str(values["question"]), context, [text for text, _ in pairs], pairs[0][1] if pairs else 0)


def windows_of(
    questions: Sequence[Question], tokenizer: Tokenizer, longest: int, stride: int, question_tokens: int
) -> Tuple[List[Window], int]:
    """The windows of all questions in order, of up to `longest` tokens each: [CLS] question [SEP] part of the context
    [SEP]; and how many questions were cut, to `question_tokens`.

    The windows of a context have `stride` tokens in common with the one before, as in BERT's own code for SQuAD
    (arXiv 1810.04805). Raises InputError where no room is left between them.
    """
    room = longest - question_tokens - tokenizer.num_special_tokens_to_add(True)
    if stride >= room:
        raise InputError(
            f"task.stride is {stride}, expected less than {room}, the tokens of a context in a window: of "
            f"data.sequence_length, {longest}, task.max_question_tokens, {question_tokens}, and special tokens are "
            "taken away"
        )
    windows: List[Window] = []
    cut = 0
    for first in range(0, len(questions), CHUNK):
        chunk = questions[first : first + CHUNK]
        tokenizer.no_truncation()
        alone = tokenizer.encode_batch([question.text for question in chunk], add_special_tokens=False)
        long = [len(encoding.ids) > question_tokens for encoding in alone]
        cut += sum(long)
        # A text that ends where a WordPiece does has the same tokens up to there.
        ends = [own.offsets[question_tokens - 1][1] if over else None for own, over in zip(alone, long)]
        tokenizer.enable_truncation(longest, stride=stride, strategy="only_second")
        pairs = [(question.text[:end], question.context) for question, end in zip(chunk, ends)]
        for number, (question, encoding) in enumerate(zip(chunk, tokenizer.encode_batch(pairs)), first):
            windows += [window_of(number, question, part) for part in (encoding, *encoding.overflowing)]
    return windows, cut


def window_of(number: int, question: Question, encoding: Encoding) -> Window:
    in_context = np.flatnonzero([sequence == 1 for sequence in encoding.sequence_ids])
    first, end = (int(in_context[0]), int(in_context[-1]) + 1) if len(in_context) else (0, 0)
    offsets = with_marks(np.array(encoding.offsets[first:end], np.int32).reshape(-1, 2), question.context)
    label = label_of(question, first, offsets)
    ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
    return Window(number, question, ids, types, first, offsets, label)


def with_marks(offsets: np.ndarray, context: str) -> np.ndarray:
    """The offsets, each up to the end of the marks that no token has, as the accents of decomposed text where accents
    are stripped: answers must neither lose them, nor count as outside for one at a window's end."""
    ends, following = offsets[:, 1], np.append(offsets[1:, 0], len(context))[: len(offsets)]
    for number in np.flatnonzero(ends < following):
        while ends[number] < following[number] and unicodedata.category(context[ends[number]]) == "Mn":
            ends[number] += 1
    return offsets


def label_of(question: Question, first: int, offsets: np.ndarray) -> Tuple[int, int]:
    """The tokens that have characters of the answer."""
    if not question.answers or not len(offsets):
        return 0, 0
    answer = question.answers[0]
    start = question.start + len(answer) - len(answer.lstrip())
    end = question.start + len(answer.rstrip())
    begin = int(np.searchsorted(offsets[:, 1], start, "right"))
    last = int(np.searchsorted(offsets[:, 0], end, "left")) - 1
    is_inside = offsets[0, 0] <= start and end <= offsets[-1, 1] and begin <= last
    return (first + begin, first + last) if is_inside else (0, 0)
