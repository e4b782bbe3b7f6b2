"""Seconds from random weights to a held-out MLM loss, here and in transformers' Trainer, on the same text.

    python benchmarks/time_to_loss.py --text corpus.txt --json time-to-loss.json --plot time-to-loss.png

Each trains alone, one after the other: transformers for `--minutes`, this project, by its config, for a part of them,
1 / `--factor`. Both fix their steps before, so each schedule ends with its time. Both have the same model, vocabulary
and training documents, and are evaluated on the same masked samples of documents that are held out. Seconds are those
of steps and waiting for data; preparing, starting and evaluating are not counted.

transformers is at its best: its tokenizer's tokens in whole blocks without padding, its collator, SDPA, fused AdamW, a
linear schedule, the faster of float32 and bfloat16 autocast, the best of `--peer`, each tried for 0.3 of the time,
memory of freed tensors kept, which doubles its speed, threads that sleep as this project's do, nothing logged or saved.

Options that this program does not have are run_pretraining.py's.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import NamedTuple

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.adapting import held_out_loss, read_all
from benchmarks.curves import read_run
from benchmarks.processes import Worker
from benchmarks.report import make_parser, print_table, write_json
from benchmarks.timing import device_name
from benchmarks.trainer import train
from bert.command_line import parse_command_line
from bert.engines.torch_devices import Cpu
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.preparing.corpus import TextFile, documents
from data.preparing.splits import TRAIN, split_of
from run_pretraining import wait_asleep

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVALUATIONS = 20  # of each run
WARM_UP_STEPS = 2  # else the first precision that is tried pays for what the other finds there
MEASURED_STEPS = 40  # to learn how many fit into the time
TRIED = 0.3  # of the peer's time, for each of its settings


class Setting(NamedTuple):
    """What is tried of transformers."""

    batch: int
    learning_rate: float
    bfloat16: bool = True

    def __str__(self):
        precision = "bfloat16 autocast" if self.bfloat16 else "float32"
        return f"{self.batch} samples a step, {self.learning_rate:g}, {precision}"


class Peer(NamedTuple):
    """What transformers trains with."""

    model: dict
    """the config's section"""
    tokenizer: object
    blocks: torch.Tensor
    """[N, L] token ids: the training documents, one after the other, each block with [CLS] and [SEP]"""
    held_out: dict
    folder: str


def make_peer(model, text, options, folder):
    """What transformers trains with, in a process that keeps the memory of freed tensors."""
    from transformers import AutoTokenizer

    Cpu().start(keeps_memory=True)
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    blocks = read_blocks(text, options, tokenizer, options.sequence_length)
    model = {**model, "vocab_size": len(tokenizer)}
    return Peer(model, tokenizer, blocks, read_all(options.output, "held_out"), folder)


def read_blocks(text, options, tokenizer, length):
    """The documents that `prepare` does not hold out."""
    texts = {}
    for number, lines in documents([TextFile(text)]):
        if split_of(number, options.held_out, options.seed) == TRAIN:
            texts.setdefault(number, []).extend(lines)
    plain = dict(add_special_tokens=False, verbose=False)
    ids = [token for lines in texts.values() for token in tokenizer(" ".join(lines), **plain).input_ids]
    inner = length - 2
    count = len(ids) // inner
    ends = [torch.full((count, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], torch.tensor(ids[: count * inner]).view(count, inner), ends[1]], 1)


def train_there(peer, setting, steps, evaluations=1, seed=0):
    """transformers' curve: [seconds, step, held-out loss] of each evaluation, the last one after the last step."""
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

    curve = []

    def evaluate(step, seconds, model):
        if step % -(-steps // evaluations) == 0 or step == steps:
            curve.append([seconds, step, held_out_loss(model, peer.held_out)])

    torch.manual_seed(seed)
    train(
        BertForMaskedLM(BertConfig(**peer.model, attn_implementation="sdpa")),
        *(peer.blocks, DataCollatorForLanguageModeling(peer.tokenizer), peer.folder, steps, setting, evaluate),
        per_device_train_batch_size=setting.batch,
        learning_rate=setting.learning_rate,
        warmup_steps=steps // 10,
        weight_decay=0.01,
        bf16=setting.bfloat16,
        seed=seed,
    )
    return curve


def rate_of(curve, batch):
    """Samples/s of a whole run."""
    seconds, steps, _ = curve[-1]
    return steps * batch / seconds


def choose_setting(peer, options):
    """The setting of transformers with the lowest held-out loss, its samples/s, and what was tried."""
    batch, learning_rate = options.peer[0]
    seconds = {}
    for bfloat16 in (True, False):
        setting = Setting(batch, learning_rate, bfloat16)
        peer.ask(train_there, setting, WARM_UP_STEPS)
        seconds[bfloat16] = peer.ask(train_there, setting, MEASURED_STEPS // 2)[-1][0]
    bfloat16 = min(seconds, key=seconds.get)
    rate, tried = MEASURED_STEPS // 2 * batch / seconds[bfloat16], {}
    for batch, learning_rate in options.peer:
        setting = Setting(batch, learning_rate, bfloat16)
        tried[setting] = peer.ask(train_there, setting, steps_in(TRIED * options.minutes, rate, batch))
        print(f"transformers, {setting}: {tried[setting][-1][-1]:.3f} after {tried[setting][-1][0]:.0f} s", flush=True)
    best = min(tried, key=lambda setting: tried[setting][-1][-1])
    return best, rate_of(tried[best], best.batch), {str(setting): curve for setting, curve in tried.items()}


def steps_in(minutes, rate, batch):
    return max(2, round(60 * minutes * rate / batch))


def train_here(data, config, output, steps, evaluations=1):
    """This project's curve, as `train_there` gives it, on what `prepare` made."""
    every = -(-steps // evaluations)
    settings = {
        "device": "cpu",
        "model.vocab_size": data.vocab_size,
        "task.nsp": "false",
        "data.files": os.path.join(data.output, "train-*.h5"),
        "data.held_out_files": os.path.join(data.output, "held_out-*.h5"),
        "training.max_steps": steps,
        "training.evaluate_every": every,
        "training.log_every": every,
        "training.output": output,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, os.path.join(ROOT, "run_pretraining.py"), *config, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = read_run(output, "hours")
    seconds = {step: 3600 * hours for step, hours in zip(run["steps"], run["places"])}
    return [[seconds[line["step"]], line["step"], line["loss"]] for line in run["evaluations"]]


def seconds_to(loss, curve):
    """When an evaluation first has that loss; None where none has."""
    return next((seconds for seconds, _, found in curve if found <= loss), None)


def report(curves, batches):
    """Prints the table; returns the figures of each, and by how much this project is sooner (None: it is not there)."""
    target = curves["transformers"][-1][-1]
    rows, figures = [], {}
    for name, curve in curves.items():
        seconds, steps, loss = curve[-1]
        there, rate = seconds_to(target, curve), rate_of(curve, batches[name])
        figures[name] = {"samples_per_second": rate, "loss": loss, "seconds_to_loss": there, "curve": curve}
        cells = [f"{seconds:.0f}", f"{steps:,}", f"{rate:.0f}", f"{loss:.3f}"]
        rows.append([name, *cells, f"{there:.0f}" if there else "not reached"])
    own, there = (figures[name]["seconds_to_loss"] for name in ("this project", "transformers"))
    sooner = there / own if own else None
    print_table(["", "seconds", "steps", "samples/s", "held-out loss", f"seconds to {target:.3f}"], rows)
    print(f"sooner by a factor of {sooner:.2f}" if sooner else "this project does not get there in its time")
    return figures, sooner


def draw(path, curves):
    """The held-out losses over seconds, and the one that transformers ends with."""
    from benchmarks.plot import plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, curve in curves.items():
        seconds, _, losses = zip(*curve)
        axes.plot(seconds, losses, marker="o", markersize=3, label=name)
    axes.axhline(curves["transformers"][-1][-1], color="grey", linestyle=":")
    axes.set(xlabel="seconds of training", ylabel="held-out MLM loss, nats")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(options, folder):
    config, shards = parse_command_line(options.config), os.path.join(folder, "shards")
    batch, length = config.training.global_batch_size, config.data.sequence_length
    sizes = dict(sequence_length=length, mask_tokens=config.data.mask_tokens, vocab_size=config.model.vocab_size)
    how = dict(format="lines", nsp=False, held_out=0.05, masking="dynamic")
    preparing = PrepareOptions(input=[options.text], output=shards, **sizes, **how)
    summary = prepare(preparing)
    print(summary, flush=True)
    measured = train_here(summary, options.config, os.path.join(folder, "measured"), MEASURED_STEPS)
    steps = steps_in(options.minutes / options.factor, rate_of(measured, batch), batch)
    peer_folder, curves = os.path.join(folder, "transformers"), {}
    with Worker(make_peer, asdict(config.model), options.text, preparing, peer_folder) as peer:
        setting, peer_rate, tried = choose_setting(peer, options)
        peer_steps = steps_in(options.minutes, peer_rate, setting.batch)
        curves["transformers"] = peer.ask(train_there, setting, peer_steps, EVALUATIONS)
    output = options.keep or os.path.join(folder, "run")
    curves["this project"] = train_here(summary, options.config, output, steps, EVALUATIONS)
    print(f"transformers' best of {len(tried)}: {setting}")
    figures, sooner = report(curves, {"transformers": setting.batch, "this project": batch})
    for name, minutes in (("transformers", options.minutes), ("this project", options.minutes / options.factor)):
        if not 0.9 < curves[name][-1][0] / (60 * minutes) < 1.1:
            print(f"{name} was to train for {60 * minutes:.0f} s: repeat this on a machine that does nothing else")
    if options.plot:
        draw(options.plot, curves)
    results = {**figures, "sooner": sooner, "tried": tried, "setting": str(setting), "config": asdict(config)}
    write_json(options.json, results, torch=torch.__version__, device=device_name("cpu"))


def setting_of(text):
    batch, rate = text.split(":")
    return int(batch), float(rate)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--text", default="python", help="a text file (default: the prose that Python brings)")
    parser.add_argument("--minutes", type=float, default=10, help="of transformers' run (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=2, help="by which this project's is shorter (%(default)s)")
    parser.add_argument("--config", default="cpu_small.json", help="run_pretraining.py's (default: %(default)s)")
    parser.add_argument("--peer", nargs="+", type=setting_of, metavar="BATCH:RATE", help="tried of transformers")
    parser.add_argument("--keep", metavar="FOLDER", help="keep this project's run here, with its checkpoint")
    parser.add_argument("--plot", metavar="FILE", help="draw both curves here")
    parser.set_defaults(peer=[(16, 5e-4), (16, 1e-3), (32, 1e-3)])
    options, others = parser.parse_known_args()
    options.config = ["--config", options.config, *others]
    wait_asleep()
    if options.plot:
        import benchmarks.plot  # noqa: F401  # says at once where matplotlib is not installed
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(options, folder)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
