"""Ctrl-C and SIGTERM that never cut an update or a save in two."""

import contextlib
import signal
import threading
import time

__all__ = ["Stop", "cancellable", "hold", "interruptible", "leave_quietly", "protected"]

LINGER = 10  # seconds

_depth = 0
_pending = None


class Stop(KeyboardInterrupt):
    """The run was asked to stop; `signal_number` says by what."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


def _handle(number, frame):
    global _pending
    if _depth:
        _pending = number
    else:
        raise Stop(number)


@contextlib.contextmanager
def interruptible():
    """SIGINT and SIGTERM raise KeyboardInterrupt inside, after any `protected` part. In other threads than the main
    one: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _depth, _pending
    depth = _depth
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _depth = depth
        if depth == 0:  # what `hold` kept from being raised
            _pending = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def protected():
    """A signal that comes inside is raised at the end, but for `cancellable` parts."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    _raise_pending()


@contextlib.contextmanager
def cancellable():
    """A part of a `protected` one that may be cut short: a signal is raised at once."""
    global _depth
    before, _depth = _depth, 0
    try:
        _raise_pending()
        yield
    finally:
        _depth = before


def hold():
    """Has signals raise nothing any more until the end of `interruptible`: an error is on its way there."""
    global _depth
    _depth += 1


def leave_quietly(status):
    """Ends this process without a word, but not before the one that speaks for it: torchrun sends the others SIGTERM as
    soon as one has ended. Raises SystemExit."""
    with contextlib.suppress(Stop), interruptible(), protected():
        until = time.monotonic() + LINGER
        while _pending is None and time.monotonic() < until:
            time.sleep(0.02)
    raise SystemExit(status)


def _raise_pending():
    global _pending
    if _depth == 0 and _pending is not None:
        number, _pending = _pending, None
        raise Stop(number)
