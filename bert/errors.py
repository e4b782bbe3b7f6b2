"""Errors of a run that are not the fault of its input (data/errors.py), and who of several processes says one."""

import contextlib
import os
from typing import Collection, Iterator

from bert.signals import Stop, leave_quietly
from data.errors import InputError

__all__ = ["Diverged", "OnnxDiffers", "ProcessLost", "ProcessesDiffer", "said_once_a_machine"]


class Diverged(RuntimeError):
    """The loss is not a finite number any more."""


class OnnxDiffers(RuntimeError):
    """A file for ONNX Runtime computes something else than the model that it was made of."""


class ProcessLost(RuntimeError):
    """Other processes of the run, of these `ranks`, have failed or ended, or do not come where this one waits."""

    def __init__(self, message: str, ranks: Collection[int] = ()):
        super().__init__(message)
        self.ranks = ranks


class ProcessesDiffer(RuntimeError):
    """The processes of the run do not have alike what they must; all of them raise it."""


@contextlib.contextmanager
def said_once_a_machine() -> Iterator[None]:
    """For what fails alike in all processes that torchrun started on a machine: the first of them raises the error,
    the others leave without a word."""
    try:
        yield
    except (InputError, Stop) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            raise
        if isinstance(error, InputError):
            leave_quietly(2)
        raise SystemExit(2)
