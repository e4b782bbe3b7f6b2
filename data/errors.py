"""Errors that a command prints in one line: bad input (exit status 2), a loader that died or a preparation that stopped
(1)."""

__all__ = ["InputError", "LoaderDied", "PrepareStopped"]


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file, the key, the value found and
    expected, and what to do."""


class LoaderDied(RuntimeError):
    """The loader's process ended or failed; the message says how."""


class PrepareStopped(RuntimeError):
    """Preparing ended before the data set was whole; what is done is kept, and the same command continues from there.
    The message says why."""
