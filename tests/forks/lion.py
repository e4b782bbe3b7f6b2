"""An optimizer: Lion (arXiv 2302.06675, algorithm 2), which keeps one moment and goes by its sign.

python -m tests.forks.lion --config quickstart.json --optimizer.name lion --optimizer.learning_rate 3e-4
"""

import sys

import torch

import run_pretraining
from bert.optimizers import OPTIMIZERS
from ops.lamb import lamb_groups


class Lion(torch.optim.Optimizer):
    def __init__(self, groups, lr, betas):
        super().__init__(groups, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                moment = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                direction = moment.lerp(weight.grad, 1 - beta1).sign()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                moment.lerp_(weight.grad, 1 - beta2)


def make_lion(named_parameters, config):
    return [Lion(lamb_groups(named_parameters, config.weight_decay), config.learning_rate, config.betas)]


OPTIMIZERS["lion"] = make_lion

if __name__ == "__main__":
    sys.exit(run_pretraining.main())
