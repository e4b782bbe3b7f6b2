"""What the benchmarks share: medians, a table, and the JSON that says on what machine and when."""

import datetime
import json
import os
import platform
import statistics
import sys
from typing import Dict, List, Optional

__all__ = ["median", "print_table", "write_json"]


def median(values: List[float]) -> float:
    return statistics.median(values)


def print_table(header: List[str], rows: List[List[str]]) -> None:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [header] + rows) for i in range(len(header))]
    for row in [header] + rows:
        print(
            "  ".join(
                str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
        )


def write_json(path: Optional[str], results: Dict, **versions: str) -> None:
    """Writes `results` with device, software, command and date; nothing where `path` is None."""
    if path is None:
        return
    about = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python"] + sys.argv),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"about": about, "results": results}, file, indent=2)
        file.write("\n")


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
