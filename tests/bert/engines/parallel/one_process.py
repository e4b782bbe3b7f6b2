"""One of several processes of a run, to which something may happen, and which notes what it computes.

    python one_process.py FOLDER WHEN [options of run_pretraining.py]

WHEN is "" or "PLACE RANK STEP WHAT": in the process of this rank, or in "all", as it comes to that place (PLACES) in
this step, of torchrun's first round. WHAT is the number of a signal that it sends itself, or a name in HAPPENINGS.
FOLDER gets <rank>.json: the metrics of each step, and the sum of all weights at the end.
"""

import dataclasses
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 4)))

import torch

import bert.run.checkpoint
import bert.run.handshake
import bert.run.loop
from bert.engines.torch_engine import TorchEngine
from bert.run.data_set import ShardSet
from data.errors import InputError
from run_pretraining import main

PLACES = {
    "data": (ShardSet, "identity"),
    "settings": (bert.run.handshake, "hash_of_source"),
    "batch": (bert.run.loop, "next_batch"),  # that comes after the step
    "passes": (TorchEngine, "passes"),
    "reduction": (torch.distributed, "all_reduce"),
    "update": (TorchEngine, "update"),
    "save": (bert.run.checkpoint, "flush_to_disk"),
}


def note_steps(folder, progress):
    step, noted = TorchEngine.step, []

    def noting(self, *arguments):
        progress["step"] = self.steps_done + 1
        metrics = step(self, *arguments)
        noted.append({name: float(value) for name, value in metrics.items()})
        weights = sum(float(weight.double().abs().sum()) for weight in self.weights().values())
        with open(os.path.join(folder, f"{self.rank}.json"), "w") as file:
            json.dump({"steps": noted, "weights": weights}, file)
        return metrics

    TorchEngine.step = noting


def fail(*arguments):
    raise InputError("train-00007.h5: sample 3 is bad")


def drift(result, engine, *arguments):
    with torch.no_grad():
        next(iter(engine.master_weights.values())).view(-1)[0] += 1e-6


def skip(batch, *arguments):
    return dataclasses.replace(batch, skipped={"/there/train-00007.h5": "it is bad"})


def differ(result):
    return "other"


def lose(identity, *arguments):
    return {**identity, "shards": identity["shards"][1:]}


HAPPENINGS = {"lose": lose, "fail": fail, "drift": drift, "skip": skip, "differ": differ}


def let_happen(place, rank, step, what, progress):
    if rank not in ("all", os.environ.get("RANK")) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    owner, name = PLACES[place]
    call = getattr(owner, name)

    def calling(*arguments, **options):
        is_gradient = place != "reduction" or (arguments[0].is_floating_point() and arguments[0].numel() > 64)
        now = progress["step"] == int(step) and is_gradient
        if now and what.isdigit():
            os.kill(os.getpid(), int(what))
        result = call(*arguments, **options)
        return (HAPPENINGS[what](result, *arguments) or result) if now and what in HAPPENINGS else result

    setattr(owner, name, calling)


def run(folder, when, words):
    progress = {"step": 0}
    note_steps(folder, progress)
    if when:
        let_happen(*when.split(), progress)
    return main(words)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
