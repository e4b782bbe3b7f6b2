"""What machine this is."""

import platform

__all__ = ["cpu_name"]


def cpu_name() -> str:
    """This machine's processor, as the system calls it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
