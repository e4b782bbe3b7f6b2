"""Errors that a command prints in one line: bad input (exit status 2), and a loader that died (1)."""

__all__ = ["InputError", "LoaderDied"]


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file, the key, what was found, what was expected, the way out."""


class LoaderDied(RuntimeError):
    """The loader's process ended or failed; the message says how."""
