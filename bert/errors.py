"""Errors of a run that are not the input's fault (those are data/errors.py's)."""

__all__ = ["Diverged"]


class Diverged(RuntimeError):
    """The loss is not a finite number any more."""
