"""The command: config -> engine -> training loop. `python run_pretraining.py --help` explains every option."""

import sys

from bert.command_line import parse_command_line
from bert.errors import Diverged
from data.commands import run_command


def main(arguments=None, **parts) -> int:
    """Runs the command and returns its exit status. `parts` are what a fork puts in place of the project's own
    (bert/run/loop.py: train)."""

    def command() -> None:
        config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        # After the config: torch takes seconds to import, an error should not.
        if config.plan:
            from bert.plan import plan

            plan(config)
        else:
            from bert.run.console import show_progress
            from bert.run.loop import train

            show_progress()
            train(config, **parts)

    return run_command(command, failures=(Diverged,))


if __name__ == "__main__":
    sys.exit(main())
