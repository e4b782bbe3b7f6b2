"""Errors that a command prints in one line."""

__all__ = ["InputError", "LoaderDied", "PrepareStopped"]


class InputError(ValueError):
    """What the user gave cannot be used: the message says which file or key, why, and what to do. Exit status 2."""


class LoaderDied(RuntimeError):
    """The loader's process ended or failed; the message says how. Exit status 1."""


class PrepareStopped(RuntimeError):
    """Preparing ended early; the message says why. The same command continues from there. Exit status 1."""
