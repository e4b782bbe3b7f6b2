"""Fine-tunes a BERT of transformers, here and in transformers' Trainer, in turns: scores and seconds.

    python benchmarks/finetuning.py --model FOLDER --train sst2-train.tsv --dev sst2-dev.tsv

First for the labels of sentences, then for named entities, in CoNLL files that it makes. Both start from the folder's
weights and train as many steps on as many examples, with AdamW, clipping and one schedule. Both are scored alike after
the last step. transformers is at its best: examples padded to the longest of each step, the faster of float32 and
bfloat16 autocast, SDPA, fused AdamW, memory of freed tensors kept, threads that sleep as this project's do, nothing
logged or saved. It is measured twice: with batches drawn at random, as this project's are and as is its default, and
with batches of like lengths, which have little padding but are another training. Seconds are those of the steps,
without tokenizing, starting and scoring.

Options that this program does not have are run_finetuning.py's.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from typing import Any, List, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from run_pretraining import wait_asleep

wait_asleep()  # both, and so before torch

import numpy as np
import torch

from benchmarks.report import make_parser, print_table, write_json
from benchmarks.timing import device_name
from benchmarks.trainer import train
from bert.command_line import parse_command_line
from bert.engines.torch_devices import Cpu
from bert.run.example_set import ExampleSet
from bert.tasks import make_task, with_labels

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE, MIXED, LIKE = "this project", "transformers", "transformers, like lengths"
CLASS = "BertFor{}Classification"
WARM_UP_STEPS = 3  # else the first way that is tried pays for what the others find there
TRIED_STEPS = 30  # of each way
NAMES = {
    "PER": ("Anna Berg", "John Smith", "Mary", "Li Wei", "Omar Haddad", "Ivan", "Sofia Rossi", "Grace", "Tom Brown"),
    "ORG": ("Acme", "Northern Bank", "City Museum", "Blue River Press", "the Red Cross", "Global Foods", "Orion"),
    "LOC": ("Paris", "New York", "Lake Como", "Norway", "South Africa", "Osaka", "the Alps", "Lima"),
}
SENTENCES = (
    "{PER} works for {ORG} in {LOC} .",
    "yesterday {ORG} opened an office near {LOC} , and {PER} was there .",
    "{PER} met {PER} in {LOC} .",
    "the river rises in the mountains and nobody knows its name .",
    "after years at {ORG} , {PER} moved to {LOC} to write about the history of {ORG} .",
    "it was cold .",
    "{ORG} said on monday that sales in {LOC} had fallen .",
)


class Job(NamedTuple):
    """What is fine-tuned for."""

    name: str
    words: List[str]
    """run_finetuning.py's options"""
    peer: str
    """transformers' class"""
    steps: int


class Way(NamedTuple):
    """How transformers computes."""

    bfloat16: bool
    like_lengths: bool

    def __str__(self):
        precision, lengths = (
            "bfloat16 autocast" if self.bfloat16 else "float32",
            "like" if self.like_lengths else "mixed",
        )
        return f"{precision}, batches of {lengths} lengths"


class Peer(NamedTuple):
    """What transformers trains with."""

    config: Any
    data_set: Any
    """an ExampleSet"""
    features: List[dict]
    kind: str
    folder: str


def train_here(job, seed, output):
    """What this project's command reports: (score after the last step, seconds of the steps)."""
    words = [*job.words, f"--training.seed={seed}", f"--training.output={output}"]
    command = [sys.executable, os.path.join(ROOT, "run_finetuning.py"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics, held_out = (read_lines(os.path.join(output, name)) for name in ("metrics.jsonl", "held_out.jsonl"))
    samples = np.diff([0, *(line["samples_seen"] for line in metrics)])
    seconds = sum(count / line["sequences_per_second"] for count, line in zip(samples, metrics))
    return held_out[-1], float(seconds)


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def open_peer(job, folder):
    words = [word.replace("--model=", "--training.start_from=") for word in job.words]
    config = with_labels(parse_command_line(words))
    data_set = ExampleSet(config, make_task(config), "cpu")
    return Peer(config, data_set, features_of(data_set.train), job.peer, folder)


def features_of(examples):
    """The examples as transformers' arguments, unpadded; with a label each, or one of each token."""
    tokens = zip(
        *(np.split(array, np.cumsum(examples.lengths)[:-1]) for array in (examples.input_ids, examples.token_type_ids))
    )
    answers = zip(
        *(np.split(array, np.cumsum(examples.counts)[:-1]) for array in (examples.positions, examples.labels))
    )
    features, each_token = [], examples.counts.max() > 1
    for (ids, types), (positions, labels) in zip(tokens, answers):
        label = np.full(len(ids), -100)
        label[positions] = labels
        features.append(
            {
                "input_ids": ids.tolist(),
                "token_type_ids": types.tolist(),
                "attention_mask": [1] * len(ids),
                "labels": label.tolist() if each_token else int(labels[0]),
            }
        )
    return features


def collate(features):
    """Padded to the longest; a label of -100 does not count."""
    length = max(len(feature["input_ids"]) for feature in features)
    batch = {}
    for name in features[0]:
        rows = [feature[name] for feature in features]
        fill = -100 if name == "labels" else 0
        if isinstance(rows[0], list):
            rows = [row + [fill] * (length - len(row)) for row in rows]
        batch[name] = torch.tensor(rows)
    return batch


def make_model(peer):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, labels = getattr(transformers, peer.kind), peer.config.task.labels
    options = dict(num_labels=len(labels), attn_implementation="sdpa")
    return kind.from_pretrained(peer.config.training.start_from, **options)


def train_there(peer, way, steps, seed=0):
    """The same in transformers: (the model, seconds of the steps)."""
    training, optimizer = peer.config.training, peer.config.optimizer
    torch.manual_seed(seed)
    model = make_model(peer)
    seconds = train(
        *(model, peer.features, collate, peer.folder, steps, way),
        per_device_train_batch_size=training.global_batch_size,
        learning_rate=optimizer.learning_rate,
        warmup_steps=round(optimizer.warmup_ratio * steps),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=way.bfloat16,
        train_sampling_strategy="group_by_length" if way.like_lengths else "random",
        seed=seed,
    )
    return model, seconds


@torch.no_grad()
def score_there(model, peer):
    """What the task scores of transformers' model, in float32."""
    held_out, outputs = peer.data_set.held_out, []
    examples, features = held_out.examples, features_of(held_out.examples)
    model.eval()
    positions = np.split(examples.positions, np.cumsum(examples.counts)[:-1])
    for first in range(0, len(features), 64):
        batch = collate(features[first : first + 64])
        del batch["labels"]
        logits = model(**batch).logits.float()
        each_token = logits.dim() == 3
        for row, place in zip(logits, positions[first : first + 64]):
            outputs.append(row[place] if each_token else row[None])
    return held_out.task.score(examples, torch.cat(outputs).numpy())


def compare(job, options, folder):
    """The scores and seconds of all, of each seed, and how transformers computed."""
    peer = open_peer(job, folder)
    metric = peer.data_set.held_out.task.selected_by
    Cpu().start(keeps_memory=True)
    seconds = {}
    for way in (Way(bfloat16, like_lengths=False) for bfloat16 in (True, False)):
        train_there(peer, way, min(WARM_UP_STEPS, job.steps))
        seconds[way] = train_there(peer, way, min(TRIED_STEPS, job.steps))[1]
    fastest = min(seconds, key=seconds.get)
    ways = {MIXED: fastest, LIKE: fastest._replace(like_lengths=True)}
    found = {HERE: [], MIXED: [], LIKE: []}
    for seed in range(1, options.seeds + 1):
        for name, way in ways.items():
            trained, spent = train_there(peer, way, job.steps, seed)
            found[name].append((score_there(trained, peer), spent))
        found[HERE].append(train_here(job, seed, os.path.join(folder, f"{job.name}-{seed}")))
        last = {name: runs[-1] for name, runs in found.items()}
        words = [f"{name} {score[metric]:.4f} in {spent:.1f} s" for name, (score, spent) in last.items()]
        print(f"{job.name}, seed {seed}: {'; '.join(words)}", flush=True)
    return {"metric": metric, **found, "ways": {name: str(way) for name, way in ways.items()}}


def report(found):
    rows = []
    for name, results in found.items():
        metric = results["metric"]
        means = {who: statistics.mean(spent for _, spent in results[who]) for who in (HERE, MIXED, LIKE)}
        for who, seconds in means.items():
            scores = [score[metric] for score, _ in results[who]]
            spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            slower = f"{seconds / means[HERE]:.2f}"
            rows.append([f"{name}, {who}", metric, f"{statistics.mean(scores):.4f}{spread}", f"{seconds:.1f}", slower])
    print_table(["", "metric", "mean of the seeds", "seconds", "slower by"], rows)


def write_entities(path, count, seed, unseen):
    """Sentences with names of people, organisations and places, in CoNLL's columns; `unseen`: with all names."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            for word in rng.choice(SENTENCES).split():
                kind = word.strip("{}")
                if kind == word:
                    file.write(f"{word} O\n")
                    continue
                name = rng.choice(NAMES[kind][: None if unseen else -2]).split()
                file.writelines(f"{part} {'I' if place else 'B'}-{kind}\n" for place, part in enumerate(name))
            file.write("\n")
    return path


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a BERT folder of transformers, in safetensors")
    parser.add_argument("--train", required=True, help="a file with the columns sentence and label, as GLUE's SST-2")
    parser.add_argument("--dev", required=True, help="another, to score on")
    parser.add_argument("--steps", type=int, default=500, help="of 32 examples (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="the peak (default: %(default)s)")
    parser.add_argument("--entities", type=int, default=2000, help="sentences with names (default: %(default)s)")
    options, options.others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": options.entities, "dev": options.entities // 4}
        split = [
            write_entities(os.path.join(folder, f"{name}.conll"), count, count, name == "dev")
            for name, count in counts.items()
        ]
        files = {"sst2.json": (options.train, options.dev), "ner.json": split}
        found = {}
        for job in (
            Job(
                "sentences",
                words_of("sst2.json", files, options.steps, options),
                CLASS.format("Sequence"),
                options.steps,
            ),
            Job(
                "names",
                words_of("ner.json", files, options.steps // 6, options),
                CLASS.format("Token"),
                options.steps // 6,
            ),
        ):
            found[job.name] = compare(job, options, folder)
    report(found)
    write_json(options.json, found, torch=torch.__version__, device=device_name("cpu"))


def words_of(config, files, steps, options):
    """run_finetuning.py's options for one of the jobs."""
    train, dev = files[config]
    settings = {
        "model": options.model,
        "device": "cpu",
        "data.files": train,
        "data.held_out_files": dev,
        "training.epochs": "null",
        "training.max_steps": steps,
        "training.log_every": max(1, steps // 20),
        "training.save_every": steps,
        "optimizer.learning_rate": options.learning_rate,
        "optimizer.warmup_ratio": 0.1,
        "optimizer.max_grad_norm": 1,
    }
    return ["--config", config, *(f"--{key}={value}" for key, value in settings.items()), *options.others]


if __name__ == "__main__":
    main()
