"""Lines on the console, by `logging`, above a progress bar."""

import logging
import shutil
import sys

from tqdm import tqdm

__all__ = ["bar_width", "show_errors_only", "show_progress"]


class ProgressBarHandler(logging.Handler):
    """Writes to stdout, where no line cuts a progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()  # a log file should show where the run is


def show_progress() -> None:
    """Shows the lines of a run: for a command. A program that calls `train` sets up logging as it likes."""
    logger = logging.getLogger("bert")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [ProgressBarHandler()], False


def show_errors_only() -> None:
    """For a process of a run that is not the first: it would say the same again."""
    logging.getLogger("bert").setLevel(logging.ERROR)


def bar_width() -> int:
    """Columns of a progress bar: the terminal's, and at most 100."""
    return min(100, shutil.get_terminal_size().columns)
