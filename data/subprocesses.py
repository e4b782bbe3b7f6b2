"""Processes of our own: ending them, and saying how one ended."""

import os
import signal
import subprocess

__all__ = ["PROJECT", "end_process", "how_it_ended"]

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def end_process(process: subprocess.Popen) -> None:
    """Kills a process whose stdin and stdout are pipes, and waits until it is gone."""
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass  # what was still to be sent to it


def how_it_ended(process: subprocess.Popen) -> str:
    """Waits for its end: "was killed by SIGKILL: the machine may have run out of memory", "ended with exit status 3",
    ..."""
    code = process.wait()
    if code >= 0:
        return f"ended with exit status {code}"
    return (
        "was killed by "
        f"{signal.Signals(-code).name}{': the machine may have run out of memory' if code == -signal.SIGKILL else ''}"
    )
