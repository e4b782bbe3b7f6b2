"""The command: config -> engine -> training loop. `python run_pretraining.py --help` explains every option."""

import signal
import sys

from bert.command_line import parse_command_line
from bert.errors import Diverged
from data.errors import InputError, LoaderDied, PrepareStopped


def main(arguments=None) -> int:
    """Runs the command and returns its exit status: 2 for input that cannot be used, 1 for a run that failed, 130 for
    Ctrl-C."""
    try:
        config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        # After the config: torch takes seconds to import, an error should not.
        if config.plan:
            from bert.plan.report import plan

            plan(config)
        else:
            from bert.run.training import train

            train(config)
    except (InputError, Diverged, LoaderDied, PrepareStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:  # a folder that cannot be written, a full disk: the message has its name
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
