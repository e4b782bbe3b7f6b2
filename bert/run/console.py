"""Lines on the console, by `logging`, above a progress bar."""

import logging
import sys

from tqdm import tqdm

__all__ = ["set_up_logging"]


class ProgressBarHandler(logging.Handler):
    """Writes to stdout, where no line cuts a progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()  # a log file should show where the run is


def set_up_logging(rank: int = 0) -> None:
    """Shows what `bert` and `data` log: all of it in the first process of a run, in others errors alone."""
    for name in ("bert", "data"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR if rank else logging.INFO)
        logger.handlers, logger.propagate = [ProgressBarHandler()], False
