"""The command: config -> engine -> training loop. `python run_pretraining.py --help` explains every option."""

import sys

from bert.config import parse_command_line
from bert.errors import Diverged
from data.commands import run_command


def main(arguments=None) -> int:
    """Runs the command and returns its exit status: 2 for input that cannot be used, 1 for a run that failed, 130 for
    Ctrl-C."""

    def run() -> None:
        config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        # After the config: torch takes seconds to import, an error should not.
        if config.plan:
            from bert.plan.report import plan

            plan(config)
        else:
            from bert.run.training import train

            train(config)

    return run_command(run, failures=(Diverged,))


if __name__ == "__main__":
    sys.exit(main())
