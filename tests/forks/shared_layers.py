"""One layer in place of all, as in ALBERT (arXiv 1909.11942): twelve blocks run it, one set of weights is trained.

python -m tests.forks.shared_layers --config quickstart.json
"""

import functools
import sys

import run_pretraining
from bert import tasks


def make_model(config, task):
    model = tasks.make_model(config, task)
    layers = model.bert["encoder"]["layer"]
    del layers[1:]
    model.blocks = [(name, layers[0] if name in model.layers else module) for name, module in model.blocks]
    model.architecture = {**model.architecture, "model_type": "bert-shared-layers"}
    return model


main = functools.partial(run_pretraining.main, make_model=make_model)

if __name__ == "__main__":
    sys.exit(main())
