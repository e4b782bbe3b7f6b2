"""Small runs for tests: their shards, their command line, what they leave behind."""

import json
import os
import subprocess
import sys

import numpy as np
import torch

from bert.run.checkpoint import list_checkpoints, read_safetensors
from data.shards import write_shard
from data.tokenizer import SPECIAL_TOKENS, vocab_sha256
from tests import ROOT
from tests.make_samples import random_samples

VOCAB, LENGTH, MASKS = 120, 32, 5
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
    "layer_norm_eps": 0.001,
}


def make_shards(folder, samples=100, seed=0, length=LENGTH, masks=MASKS):
    folder.mkdir()
    words = list(SPECIAL_TOKENS) + [f"word{i}" for i in range(VOCAB - len(SPECIAL_TOKENS))]
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    rng = np.random.default_rng(seed)
    for i, count in enumerate((samples - 33, 33)):
        write_shard(
            str(folder / (f"train-{i:05}.h5")),
            random_samples(rng, count, length, masks, VOCAB),
            VOCAB,
            vocab_sha256(words),
            {},
        )
    return folder


def arguments(tmp_path, shards, **changes):
    values = {
        "device": "cpu",
        "model": dict(MODEL),
        "optimizer": {"learning_rate": 0.01, "warmup_ratio": 0.2},
        "data": {"files": str(shards / "train-*.h5"), "sequence_length": LENGTH, "mask_tokens": MASKS},
        "training": {
            "global_batch_size": 24,
            "micro_batch_size": 8,
            "max_steps": 12,
            "log_every": 1,
            "save_every": 100,
            "precision": "float32",
            "compile": "off",
            "output": str(tmp_path / "run"),
        },
        "ipu": {"layers_per_ipu": [0, 2]},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(values))
    return ["--config", str(path)] + [
        word for key, value in changes.items() for word in ("--" + key.replace("__", "."), str(value))
    ]


def start(words):
    """The command as a process of its own, with lines as they come."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "run_pretraining.py")] + [str(word) for word in words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def saved_step(path):
    with open(os.path.join(path, "training_state.json")) as file:
        return json.load(file)["step"]


def checkpoints(tmp_path, run="run"):
    return list_checkpoints(str(tmp_path / run / "checkpoints"))


def assert_same_state(one, other):
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = read_safetensors(os.path.join(one, name)), read_safetensors(os.path.join(other, name))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)


def read_lines(tmp_path, run="run"):
    return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [
        {k: v for k, v in line.items() if k not in ("sequences_per_second", "data_wait_fraction")} for line in lines
    ]
