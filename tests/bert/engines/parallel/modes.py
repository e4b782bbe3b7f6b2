"""Started by torchrun: trains one engine alone and one of each way to share the work, and notes how far they are apart.

    python modes.py FOLDER WAY ...

A way is "shard optimizer", "pipeline 2 3 full adamw bfloat16" (processes, stages of each, shard) and so on.
Each process writes FOLDER/<rank>.json: way -> {"weights": largest relative distance of a parameter, "together": that of
all together, "metrics": largest distance of a loss, "skipped": ...}.
"""

import json
import os
import pathlib
import sys
import tempfile

import numpy as np
import torch

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 4)))

from bert.command_line import parse_command_line
from bert.engines import make_engine, part_of
from bert.engines.parallel import pipeline, reduction
from bert.engines.parallel.processes import current, joined
from data.rows import unpacked_batch
from tests.bert.run.runs import LENGTH, MASKS, VOCAB, arguments, make_shards
from tests.make_samples import random_samples

LAYERS, STEPS = 6, 2


def options_of(way):
    """Those that one process has too, and those that it has not."""
    kind, *words = way.split()
    precision = words.pop() if words[-1] == "bfloat16" else "float32"
    optimizer = words.pop() if words[-1] in ("lamb", "adamw", "muon") else "lamb"
    names = {"shard": ["parallel__shard"], "pipeline": ["parallel__pipeline", "parallel__stages_per_process"]}
    names["pipeline"].append("parallel__shard")
    options = {"optimizer__name": optimizer, "training__precision": precision}
    if optimizer == "adamw":  # with an eps that has the size of gradients matter
        options.update(optimizer__max_grad_norm=0.01, optimizer__eps=0.01)
    return options, dict(zip(names[kind], words))


def run(engine, batch, learning_rate):
    """Metrics of two steps and an evaluation, and what a gradient that is not a number does in the last process."""
    metrics = [engine.step(batch, learning_rate, step) for step in range(1, 1 + STEPS)] + [engine.evaluate(batch)]
    numbers = [float(value) for values in metrics for name, value in values.items() if "loss" in name]
    weights = whole(engine)
    update = engine.update

    def spoiled(learning_rate):
        if engine.rank == engine.world_size - 1:
            gradient = next(iter(engine.master_weights.values())).grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[:1] = float("nan")
        update(learning_rate)

    engine.update = spoiled
    engine.step(batch, learning_rate, STEPS + 1)
    after = whole(engine)
    return numbers, weights, engine.skipped_updates(), all(torch.equal(after[name], weights[name]) for name in weights)


def whole(engine):
    weights = engine.master_weights.items()
    return {name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone() for name, w in weights}


def distance(one, other):
    return float((one - other).norm() / other.norm())


def main(folder, *ways):
    rng = np.random.default_rng(int(os.environ["TORCHELASTIC_RUN_ID"].encode().hex(), 16) % 2**32)
    samples = random_samples(rng, 22, LENGTH, MASKS, VOCAB)
    samples.nsp_labels[:] = np.arange(22) % 4 == 0  # half and half would cancel gradients down to their rounding
    batch = unpacked_batch(samples)
    place = pathlib.Path(tempfile.mkdtemp())
    shards = make_shards(place / "shards")

    def config_of(**options):
        exact = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0}
        sizes = {"model__num_hidden_layers": LAYERS}
        exact.update(training__micro_batch_size=2, parallel__timeout=60)
        return parse_command_line(arguments(place, shards, **exact, **sizes, **options))

    found, alone = {}, {}
    rates = {"lamb": 0.01, "adamw": 0.001, "muon": 0.001}
    for way in ways:
        options, _ = options_of(way)
        if str(options) not in alone:
            rate = rates[options["optimizer__name"]]
            alone[str(options)] = run(make_engine(config_of(**options), "cpu"), batch, rate)
    # Several rounds of a pipeline, and several sums of gradients inside the last backward pass.
    pipeline.ROUND, reduction.BUCKET_BYTES = 2, 20_000
    with joined("cpu", 60):
        for way in ways:
            options, parallel = options_of(way)
            config, rate = config_of(**options, **parallel), rates[options["optimizer__name"]]
            numbers, weights, _, _ = alone[str(options)]
            own_numbers, own, skipped, unchanged = run(
                make_engine(config, "cpu"), part_of(config, "cpu").of(batch), rate
            )
            # The gradient of the key's bias is 0 but for rounding.
            compared = [name for name in own if not name.endswith("key.bias")]
            found[way] = {
                "weights": max(distance(own[name], weights[name]) for name in compared),
                "together": distance(*(torch.cat([x[name].flatten() for name in compared]) for x in (own, weights))),
                "metrics": max(abs(a - b) for a, b in zip(own_numbers, numbers)),
                "skipped": skipped,
                "unchanged": unchanged,
                "names": sorted(own),
            }
        rank = current().rank
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
