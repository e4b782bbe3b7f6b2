"""The command: config -> engine -> training loop. `python run_pretraining.py --help` explains every option."""

import os
import sys

from bert.command_line import parse_command_line
from bert.errors import Diverged, ProcessesDiffer, ProcessLost, said_once_a_machine
from data.commands import run_command
from data.subprocesses import usable_cpus

FEW_CORES = 16  # with more, sleeping threads take too long to wake


def main(arguments=None, **parts) -> int:
    """Runs the command and returns its exit status. `parts` are what a fork puts in place of the project's own
    (bert/run/loop.py: train)."""

    def command() -> None:
        with said_once_a_machine():
            config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        wait_asleep()
        # After the config: torch takes seconds to import, an error should not.
        if config.plan:
            from bert.plan import plan

            plan(config)
        else:
            from bert.run.console import show_progress
            from bert.run.loop import train

            show_progress()
            train(config, **parts)

    return run_command(command, failures=(Diverged, ProcessLost, ProcessesDiffer))


def wait_asleep() -> None:
    """Has threads that wait for others spin for microseconds and then sleep, not spin for milliseconds, where they are
    few: else another process on the machine gets its core only when its time is up, and all others wait. libgomp reads
    this when torch is imported."""
    if usable_cpus() <= FEW_CORES and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if __name__ == "__main__":
    sys.exit(main())
