"""Errors of a run that are not the input's fault (those are data/errors.py's)."""

__all__ = ["Diverged", "ProcessLost"]


class Diverged(RuntimeError):
    """The loss is not a finite number any more."""


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not come where this one waits for it."""
