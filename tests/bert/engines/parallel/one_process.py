"""One of several processes of a run, which may send itself a signal, and notes what it computes.

    python one_process.py FOLDER WHEN [options of run_pretraining.py]

WHEN is "" or "METHOD RANK STEP SIGNAL": the process of this rank sends itself the signal as it calls that method of
TorchEngine for this step. FOLDER gets <rank>.json: the metrics of each step, and the sum of all weights at the end.
"""

import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 4)))

from bert.engines.torch_engine import TorchEngine
from run_pretraining import main


def note_steps(folder):
    step, noted = TorchEngine.step, []

    def noting(self, *arguments):
        metrics = step(self, *arguments)
        noted.append({name: float(value) for name, value in metrics.items()})
        weights = sum(float(weight.double().abs().sum()) for weight in self.weights().values())
        with open(os.path.join(folder, f"{self.rank}.json"), "w") as file:
            json.dump({"steps": noted, "weights": weights}, file)
        return metrics

    TorchEngine.step = noting


def signal_itself(method, rank, step, number):
    call = getattr(TorchEngine, method)

    def signalling(self, *arguments):
        if (self.rank, self.steps_done + 1) == (int(rank), int(step)):
            os.kill(os.getpid(), int(number))
        return call(self, *arguments)

    setattr(TorchEngine, method, signalling)


if __name__ == "__main__":
    note_steps(sys.argv[1])
    if sys.argv[2]:
        signal_itself(*sys.argv[2].split())
    sys.exit(main(sys.argv[3:]))
