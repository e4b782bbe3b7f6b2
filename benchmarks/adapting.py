"""Adapts a BERT of transformers to a text, here and in transformers' own loop, in turns: held-out losses and seconds.

    python benchmarks/adapting.py --model FOLDER --text wikitext-2-valid.txt --format wikitext

Both start from the folder's weights and train on the same samples, masked alike, as many steps, with AdamW, clipping
and a linear schedule; a head that the folder lacks starts anew in both. transformers has its dynamic padding, fused
AdamW and, where this project has it, bfloat16 autocast. Seconds are those of the steps, without the start.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.timing import device_name
from bert.engines.torch_devices import Cpu
from data.loading.shard_files import open_shards, read_checked
from data.prepare import PrepareOptions, prepare
from data.rows import unpacked_batch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTH, MASKS = 128, 20


def train_here(options, shards, output, seed):
    """What this project's command reports: (held-out loss of MLM, seconds of its steps)."""
    words = [sys.executable, os.path.join(ROOT, "run_pretraining.py"), "--device", "cpu"]
    settings = {
        "training.start_from": options.model,
        "task.nsp": "false",
        "training.max_steps": options.steps,
        "training.global_batch_size": options.batch,
        "training.log_every": options.steps,
        "training.seed": seed,
        "training.output": output,
        "data.files": os.path.join(shards, "train-*.h5"),
        "data.held_out_files": os.path.join(shards, "held_out-*.h5"),
        "optimizer.learning_rate": options.learning_rate,
    }
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as lines:
        rates = [json.loads(line)["sequences_per_second"] for line in lines]
    with open(os.path.join(output, "held_out.json"), encoding="utf-8") as file:
        return json.load(file)["loss"], options.steps * options.batch / rates[-1]


def read_all(shards, split):
    """The samples of a split as transformers' arguments, one sample a row."""
    inputs = []
    for shard in open_shards([os.path.join(shards, f"{split}-*.h5")]):
        batch = unpacked_batch(read_checked(shard, 0, shard.num_samples, 0))
        labels = np.full(batch["input_ids"].shape, -100)
        at, slots = np.nonzero(batch["mlm_weights"])
        labels[at, batch["mlm_positions"][at, slots]] = batch["mlm_labels"][at, slots]
        names = ("input_ids", "token_type_ids")
        arrays = {**{name: batch[name] for name in names}, "attention_mask": batch["sample_ids"], "labels": labels}
        inputs.append({name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})
    return {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}


def rows_of(inputs, rows):
    """Some samples, padded to the longest of them."""
    part = {name: tensor[rows] for name, tensor in inputs.items()}
    longest = int(part["attention_mask"].sum(1).max())
    return {name: tensor[:, :longest].contiguous() for name, tensor in part.items()}


def train_there(options, shards, seed):
    """The same in transformers: (held-out loss of MLM before, after, seconds of the steps)."""
    from transformers import BertForMaskedLM, get_linear_schedule_with_warmup

    torch.manual_seed(seed)
    model = BertForMaskedLM.from_pretrained(options.model, attn_implementation="sdpa").train()
    train, held_out = read_all(shards, "train"), read_all(shards, "held_out")
    before = held_out_loss(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    order = torch.cat([torch.randperm(len(train["labels"])) for _ in range(options.epochs(len(train["labels"])))])
    start = time.perf_counter()
    for rows in tqdm(order.split(options.batch)[: options.steps], desc="transformers", unit="step"):
        with torch.autocast("cpu", torch.bfloat16, enabled=Cpu().has_bfloat16()):
            loss = model(**rows_of(train, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return before, held_out_loss(model, held_out), seconds


@torch.no_grad()
def held_out_loss(model, inputs):
    """The mean cross-entropy of all masked tokens, in float32 and without dropout."""
    model.eval()
    total, count = 0.0, 0
    for rows in torch.arange(len(inputs["labels"])).split(64):
        part = rows_of(inputs, rows)
        labels = part.pop("labels")
        logits = model(**part).logits[labels >= 0]
        total += torch.nn.functional.cross_entropy(logits, labels[labels >= 0], reduction="sum").item()
        count += len(logits)
    model.train()
    return total / count


def run(options, folder):
    shards, rows = os.path.join(folder, "shards"), []
    vocabulary = os.path.join(options.model, "vocab.txt")
    settings = dict(format=options.format, vocab=vocabulary, nsp=False, held_out=0.1)
    sizes = dict(sequence_length=LENGTH, mask_tokens=MASKS)
    print(prepare(PrepareOptions(input=[options.text], output=shards, **settings, **sizes)))
    here, there = [], []
    for seed in range(options.rounds):
        there.append(train_there(options, shards, seed))
        here.append(train_here(options, shards, os.path.join(folder, f"run-{seed}"), seed))
    before = median([each[0] for each in there])
    peer_loss, peer_seconds = (median([each[place] for each in there]) for place in (1, 2))
    own_loss, own_seconds = (median([each[place] for each in here]) for place in (0, 1))
    rows = [
        ["transformers", f"{before:.3f}", f"{peer_loss:.3f}", f"{peer_seconds:.1f}", "1.00"],
        ["this project", f"{before:.3f}", f"{own_loss:.3f}", f"{own_seconds:.1f}", f"{peer_seconds / own_seconds:.2f}"],
    ]
    steps = f"{options.steps} steps of {options.batch} samples of {LENGTH} tokens"
    print(f"{steps}, learning rate {options.learning_rate}; medians of {options.rounds} rounds")
    print_table(["", "held-out MLM before", "after", "seconds", "faster by"], rows)
    results = {"transformers": there, "this project": here, "steps": options.steps, "batch": options.batch}
    write_json(options.json, results, torch=torch.__version__, device=device_name("cpu"))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a BERT folder of transformers, in safetensors")
    parser.add_argument("--text", required=True, help="a text file; a tenth of its documents is held out")
    parser.add_argument("--format", default="lines", help="as data.prepare's (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="the peak (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both, each with another seed (default: %(default)s)")
    options = parser.parse_args()
    options.epochs = lambda samples: -(-options.steps * options.batch // samples)
    with tempfile.TemporaryDirectory() as folder:
        run(options, folder)


if __name__ == "__main__":
    main()
