"""A schedule: after the warm-up the learning rate falls as one over the root of the step (arXiv 1706.03762, section
5.3).

    python -m tests.forks.inverse_square_root --config quickstart.json --optimizer.schedule inverse_square_root
"""

import sys

import run_pretraining
from bert.schedules import SCHEDULES


def inverse_square_root(config, step, peak_step, max_steps):
    return config.learning_rate * (peak_step / step) ** 0.5


SCHEDULES["inverse_square_root"] = inverse_square_root

if __name__ == "__main__":
    sys.exit(run_pretraining.main())
