"""Sentences of words with a tag each: columns as CoNLL has them, JSON lines and parquet; and their tokens."""

import re
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from tokenizers import Encoding

from data.errors import InputError
from data.examples.records import JSON_LINES, read_records, stem_and_ending
from data.preparing.text_file import read_text

__all__ = ["Pieces", "Sentence", "pieces_of", "read_sentences"]

WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels")
DOCUMENT = "-DOCSTART-"  # what CoNLL-2003 has for the beginning of a document


class Sentence(NamedTuple):
    place: str
    """The file, and the line that it begins in."""
    words: List[str]
    tags: List[str]


def read_sentences(paths: Sequence[str], words: Optional[str], tags: Optional[str]) -> List[Sentence]:
    """The sentences of all files.

    JSON lines and parquet, by the file's ending, have a list of words and one of tags in the columns of these names, by
    default one of WORDS and one of TAGS. Other files have a word a line and a blank line between sentences. Spaces or
    tabs separate their columns, which are numbered from 1; by default the first is the word and the last the tag.
    Raises InputError that names file and line.
    """
    sentences: List[Sentence] = []
    for path in paths:
        before = len(sentences)
        if stem_and_ending(path)[1] in (*JSON_LINES, ".parquet"):
            columns = {"words": (words,) if words else WORDS, "tags": (tags,) if tags else TAGS}
            for place, values in read_records([path], columns):
                sentences.append(sentence_of(place, values["words"], values["tags"]))
        else:
            numbers = number_of(path, "task.text_columns", words, 1), number_of(path, "task.label_column", tags, 0)
            sentences += column_sentences(path, *numbers)
        if len(sentences) == before:
            raise InputError(f"{path}: has no sentences; expected a word and its tag in each line, or JSON lines")
    return sentences


def sentence_of(place: str, words: Any, tags: Any) -> Sentence:
    for name, values in (("words", words), ("tags", tags)):
        if not isinstance(values, list) or not all(isinstance(value, (str, int)) for value in values):
            raise InputError(f"{place}: its {name} are {str(values)[:40]!r}, expected a list of them")
    if len(words) != len(tags):
        raise InputError(f"{place}: has {len(words)} words and {len(tags)} tags, expected a tag for each word")
    return Sentence(place, list(map(str, words)), list(map(str, tags)))


def number_of(path: str, key: str, column: Optional[str], default: int) -> int:
    """The number of a column; 0 is the last."""
    if column is None:
        return default
    if not (column.isdigit() and int(column)):
        raise InputError(f"{path}: its columns have no names, but {key} is {column!r}, expected a number from 1 on")
    return int(column)


def column_sentences(path: str, word: int, tag: int) -> Iterator[Sentence]:
    sentence, size = Sentence("", [], []), 0
    for number, line in enumerate(lines_of(path), 1):
        columns = [column.strip(" ") for column in line.split("\t")] if "\t" in line else re.split(" +", line)
        if not line or columns[0] == DOCUMENT:
            if sentence.words:
                yield sentence
            sentence = Sentence("", [], [])
            continue
        place, size = f"{path}: line {number}", size or len(columns)
        if len(columns) != size or size < max(2, word, tag):
            expected = f"{size} as in the lines before" if len(columns) != size else f"at least {max(2, word, tag)}"
            raise InputError(
                f"{place} has {len(columns)} columns, expected {expected}: a word and its tag (task.label_column), "
                "separated by spaces or tabs, in each line, and blank lines between sentences"
            )
        if not sentence.words:
            sentence = Sentence(place, [], [])
        sentence.words.append(columns[word - 1])
        sentence.tags.append(columns[tag - 1])
    if sentence.words:
        yield sentence


def lines_of(path: str) -> Iterator[str]:
    """Without the spaces at their ends: not str.strip, for words may be of other white space."""
    for text in read_text(path, lambda count: None, cut_long=False):
        yield from (line.strip(" \t\r") for line in text.split("\n")[: -1 if text.endswith("\n") else None])


class Pieces(NamedTuple):
    """The tokens of a sentence."""

    ids: List[int]
    firsts: np.ndarray
    """[K] the places of the first token of each word that has one"""
    words: np.ndarray
    """[K] which words those are"""
    cut: bool
    """whether words were left out, for the sentence has too many tokens"""


def pieces_of(encoding: Encoding, longest: int) -> Pieces:
    """Up to `longest` tokens of a sentence's whole words, with the special tokens around them.

    Words may have no token: those of which the tokenizer's normalisation leaves nothing, and, where the sentence is
    longer, all from the first that does not fit as a whole. A first word that is too long alone keeps what fits of it.
    """
    ids = encoding.ids
    of_word = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
    firsts = np.flatnonzero((of_word >= 0) & (of_word != np.append(-1, of_word[:-1])))
    over = len(ids) - longest
    if over > 0:
        end = 1 + int(np.flatnonzero(of_word >= 0)[-1])
        last = int(firsts[firsts <= end - over][-1])
        limit = last if last > firsts[0] else end - over
        ids, firsts = ids[:limit] + ids[end:], firsts[firsts < limit]
    return Pieces(ids, firsts, of_word[firsts], over > 0)
