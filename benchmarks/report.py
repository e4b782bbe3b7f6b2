"""What the benchmarks share: their options, medians, a table, and the JSON that says on what machine and when."""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from typing import Any, Dict, List, Optional, Sequence

from bert.machine import cpu_name

__all__ = ["about", "make_parser", "median", "print_table", "write_json"]


def make_parser(description: Optional[str]) -> argparse.ArgumentParser:
    """A parser that prints the program's docstring as it is, with --json. Options cannot be abbreviated: those that it
    does not know may be run_pretraining.py's."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    return parser


def median(values: List[float]) -> float:
    return statistics.median(values)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for first, *others in [header, *rows]:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]))


def about(**versions: str) -> Dict[str, Any]:
    """Machine, software, command and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def write_json(path: Optional[str], results: Dict[str, Any], **versions: str) -> None:
    """Writes `results` with device, software, command and date; nothing where `path` is None."""
    if path is None:
        return
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"about": about(**versions), "results": results}, file, indent=2)
        file.write("\n")
