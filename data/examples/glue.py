"""The eight GLUE tasks of BERT's paper (arXiv 1804.07461): their files, columns, labels and metrics."""

import glob
import os
from typing import Dict, List, NamedTuple, Sequence, Tuple

from data.errors import InputError

__all__ = ["GLUE", "GlueTask", "glue_files"]

ENTAILMENT = ("entailment", "not_entailment")


class GlueTask(NamedTuple):
    """Columns have the names of GLUE's own files, then those of its copies as JSON lines."""

    folder: str
    """in which GLUE's archive has its files"""
    texts: Sequence[Tuple[str, ...]]
    """the columns of one text or two"""
    label: Tuple[str, ...]
    labels: Sequence[str]
    """in the order of their numbers in the JSON lines; none where a number is predicted"""
    metric: str
    """GLUE's own, the first where it has two"""
    header: Sequence[str] = ()
    """of a TSV without one"""
    dev: str = "dev"
    """the split that it is scored on"""


GLUE: Dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        [("sentence",)],
        ("label",),
        ("unacceptable", "acceptable"),
        "matthews_correlation",
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", [("sentence",)], ("label",), ("negative", "positive"), "accuracy"),
    "mrpc": GlueTask(
        "MRPC",
        [("#1 String", "sentence1"), ("#2 String", "sentence2")],
        ("Quality", "label"),
        ("not_equivalent", "equivalent"),
        "f1",
    ),
    "stsb": GlueTask("STS-B", [("sentence1",), ("sentence2",)], ("score", "label"), (), "spearman"),
    "qqp": GlueTask(
        "QQP", [("question1",), ("question2",)], ("is_duplicate", "label"), ("not_duplicate", "duplicate"), "f1"
    ),
    "mnli": GlueTask(
        "MNLI",
        [("sentence1", "premise"), ("sentence2", "hypothesis")],
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        dev="dev_matched",
    ),
    "qnli": GlueTask("QNLI", [("question",), ("sentence",)], ("label",), ENTAILMENT, "accuracy"),
    "rte": GlueTask("RTE", [("sentence1",), ("sentence2",)], ("label",), ENTAILMENT, "accuracy"),
}


def glue_files(folder: str, name: str) -> Tuple[List[str], List[str]]:
    """The files of a task to train on and to score on, in the folder that GLUE's archive unpacks to. Raises InputError
    that names what is not there."""
    task = GLUE[name]
    place = os.path.join(folder, task.folder)
    found = []
    for splits in (("train",), (task.dev, task.dev.replace("dev", "validation"))):
        paths = [path for split in splits for path in sorted(glob.glob(os.path.join(glob.escape(place), f"{split}.*")))]
        paths = [path for path in paths if path.endswith((".tsv", ".jsonl"))]
        if not paths:
            wanted = os.path.join(place, f"{splits[0]}.tsv")
            raise InputError(
                f"{wanted}: no such file, and no .jsonl. task.folder names the folder with {task.folder}/ in it, as "
                "GLUE's archive has it; or name files with data.files and data.held_out_files"
            )
        found.append(paths[:1])
    return found[0], found[1]
