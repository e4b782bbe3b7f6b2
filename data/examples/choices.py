"""Questions with several endings to choose from: SWAG's CSV, and JSON lines, parquet and TSV of like columns."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from data.errors import InputError
from data.examples.records import Record, names_of, read_records

__all__ = ["Choice", "read_choices"]

CONTEXTS, BEGINNINGS = ("sent1", "context", "article"), ("sent2", "question")
LISTS, ANSWERS = ("endings", "choices", "options"), ("label", "answer")


class Choice(NamedTuple):
    context: str
    endings: List[str]
    """each with the beginning that all share"""
    label: int


def read_choices(
    paths: Sequence[str], count: int, text_columns: Sequence[str], label_column: Optional[str]
) -> List[Choice]:
    """The choices of all files, `count` endings each.

    `text_columns`: the column of the context; if there is one, that of what all endings begin with; then that of the
    list of endings, or those of the endings one by one. By default SWAG's and such as are named alike. The label is the
    right ending's number from 0 on, or its letter. Raises InputError that names file and row.
    """
    choices: List[Choice] = []
    for path in paths:
        texts = list(text_columns) or columns_in(path, names_of(path), count)
        columns: Dict[str, Sequence[str]] = {str(number): (name,) for number, name in enumerate(texts)}
        columns["label"] = (label_column,) if label_column else ANSWERS
        choices += [choice_of(record, len(texts), count) for record in read_records([path], columns)]
    return choices


def columns_in(path: str, names: Sequence[str], count: int) -> List[str]:
    """Those of `names` that have texts, in the order of `text_columns`."""
    begin = [next((name for name in known if name in names), "") for known in (CONTEXTS, BEGINNINGS)]
    lists = [name for name in LISTS if name in names][:1]
    singles = [f"ending{number}" for number in range(count)]
    endings = lists or singles
    if not any(begin) or not set(endings) <= set(names):
        raise InputError(
            f"{path}: has the columns {', '.join(map(repr, names))}; expected {' or '.join((*CONTEXTS, *BEGINNINGS))}, "
            f"and a list in {' or '.join(LISTS)}, or {', '.join(singles)} (task.choices is {count}). Name them with "
            "task.text_columns"
        )
    return [*filter(None, begin), *endings]


def choice_of(record: Record, columns: int, count: int) -> Choice:
    values = [record.values[str(number)] for number in range(columns)]
    is_list = isinstance(values[-1], list)
    before, endings = (values[:-1], values[-1]) if is_list else (values[:-count], values[-count:])
    if not 1 <= len(before) <= 2:
        raise InputError(
            f"{record.place}: task.text_columns names {columns} columns, expected those of a context, maybe of what "
            f"the endings begin with, and of {count} endings (task.choices), or of a list of them"
        )
    if len(endings) != count:
        raise InputError(f"{record.place}: has {len(endings)} endings, expected {count}: task.choices says how many")
    wrong = next((text for text in (*before, *endings) if not isinstance(text, (str, int, float))), "")
    if wrong != "":
        raise InputError(f"{record.place}: has {str(wrong)[:40]} among its texts, expected a text")
    *beginning, endings = *before[1:], [str(ending) for ending in endings]
    begun = [" ".join((*map(str, beginning), ending)) for ending in endings]
    return Choice(str(before[0]), begun, label_of(record, count))


def label_of(record: Record, count: int) -> int:
    value: Any = str(record.values["label"]).strip()
    names: Tuple[str, ...] = tuple(chr(ord("A") + number) for number in range(count))
    known = {**{str(number): number for number in range(count)}, **{name: number for number, name in enumerate(names)}}
    if value.upper() not in known:
        expected = f"the number of the right ending, 0 to {count - 1}, or its letter, {names[0]} to {names[-1]}"
        raise InputError(f"{record.place}: the label is {record.values['label']!r}, expected {expected}")
    return known[value.upper()]
