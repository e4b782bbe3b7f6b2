"""A run: shards -> loader -> engine -> metrics and checkpoints, from the first step or from where it stopped."""

import dataclasses
import glob
import json
import math
import os
import time
from typing import Dict, List, Optional, Tuple

import torch
from tqdm import tqdm

from bert.checkpoint import list_checkpoints, load_training_state, load_weights, save_checkpoint, write_json
from bert.config import Config, learning_rate_at
from bert.curve import draw_curve, read_metrics
from bert.engines import choose_device
from bert.engines.torch_engine import TorchEngine
from bert.errors import Diverged
from bert.graph import BertForPretraining, initialize
from bert.interrupts import interruptible, protected
from bert.stages import make_stages
from data.errors import InputError, LoaderDied
from data.loader import Loader, batches_in_order
from data.prepare import prepare
from data.shards import ShardInfo, open_shards, vocab_sha256
from data.tokenizer import read_vocab
from ops.lamb import lamb_groups

__all__ = ["make_engine", "train"]

# Values of a micro-batch's hidden state [rows, length, hidden] where the config leaves its size open. On the CPU 4 MB of them stay
# near the caches; on CUDA they keep the matrix units busy and fit BERT-base in 16 GB.
MICRO_BATCH_VALUES = {"cpu": 2 ** 20, "cuda": 12 * 2 ** 20}
METRICS = ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy")


def train(config: Config) -> int:
    """Runs `config` to its end and returns the number of steps done.

    Raises InputError before the first step for anything in config or files that cannot be used; Diverged for a loss that is no
    number; KeyboardInterrupt for Ctrl-C and SIGTERM, InputError for shards that turn bad and LoaderDied, each after saving a
    checkpoint.
    """
    with interruptible():
        device, device_line = choose_device(config.device)
        make_shards_from_text(config)
        shards, words = open_data(config)
        data_set = {"samples": [shard.num_samples for shard in shards], "vocab_sha256": shards[0].vocab_sha256}
        resume_from = find_run(config, data_set)
        engine = make_engine(config, device)
        samples = sum(data_set["samples"])
        say("device: %s, %s" % (device_line, engine.describe()))
        say("data: %d samples in %d shards; %d steps of %d are %.2f epochs" % (
            samples, len(shards), config.training.max_steps, config.training.global_batch_size,
            config.training.max_steps * config.training.global_batch_size / samples))
        if resume_from:
            load_weights_into(engine, resume_from, config, complete=True)
            state, moments = load_training_state(resume_from)
            engine.load_optimizer_state(moments)
            engine.steps_done = state["step"]
            say("continues from %s" % resume_from)
        elif config.training.start_from:
            load_weights_into(engine, config.training.start_from, config, complete=False)
        start_run_folder(config, engine.steps_done)
        run_steps(config, engine, words, data_set)
        if engine.steps_done == config.training.max_steps:
            finish(config, engine)
    return engine.steps_done


def run_steps(config: Config, engine, words: List[str], data_set: Dict) -> None:
    """The training loop: from the engine's step to the last one, with metrics, checkpoints, and one more on Ctrl-C."""
    from torch.utils.tensorboard import SummaryWriter

    training, folder = config.training, config.training.output
    last = min(training.max_steps, training.stop_at_step or training.max_steps)
    first = engine.steps_done

    def save() -> None:
        with protected():
            path = save_checkpoint(
                os.path.join(folder, "checkpoints"), engine.steps_done, engine.weights(), engine.optimizer_state(), config.model, words,
                {"step": engine.steps_done, "samples_seen": engine.steps_done * training.global_batch_size,
                 "data_set": data_set, "config": dataclasses.asdict(config)}, training.keep_checkpoints)
        say("saved %s" % path)

    if first >= last:
        say("step %d of %d is done already: nothing to do" % (first, last))
        return
    loader = Loader(config.data.files, training.global_batch_size, training.seed, samples_seen=first * training.global_batch_size,
                    sequence_length=config.data.sequence_length, mask_tokens=config.data.mask_tokens,
                    vocab_size=config.model.vocab_size, workers=config.data.workers)
    bar = tqdm(total=last * training.global_batch_size, initial=first * training.global_batch_size, unit="seq", disable=None,
               dynamic_ncols=True, smoothing=0.05, desc="training")
    saved = first
    with loader, bar, SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=first + 1) as board, \
            open(os.path.join(folder, "metrics.jsonl"), "a", encoding="utf-8") as log:
        try:
            since, waited, recent = time.perf_counter(), 0.0, []
            while engine.steps_done < last:
                step = engine.steps_done + 1
                before = time.perf_counter()
                batch = loader.next()
                waited += time.perf_counter() - before
                learning_rate = learning_rate_at(step, config.optimizer, training.max_steps)
                recent.append(engine.step(batch.arrays, learning_rate, step, bar.update))
                if step % training.log_every == 0 or step == last or step % training.save_every == 0:
                    check_finite(recent[-1], step)
                if step % training.log_every == 0 or step == last:
                    seconds = time.perf_counter() - since
                    line = summarize(recent, step, learning_rate, training.global_batch_size, seconds, waited)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    for name in line:
                        if name not in ("step", "samples_seen"):
                            board.add_scalar(name, line[name], step)
                    say(console_line(line, last, seconds / len(recent)))
                    since, waited, recent = time.perf_counter(), 0.0, []
                if step % training.save_every == 0 or step == last:
                    save()
                    saved = step
        except (KeyboardInterrupt, InputError, LoaderDied):
            if engine.steps_done > saved:
                save()
            say("stopped after step %d of %d. To go on: the same command with --resume auto" % (engine.steps_done, training.max_steps))
            raise


def make_engine(config: Config, device: str) -> TorchEngine:
    """The engine for `device`, its graph initialised from the seed."""
    stages = make_stages(config.ipu.layers_per_ipu, config.ipu.matmul_proportion)
    graph = BertForPretraining(config.model, stages, config.ipu.embedding_serialization_factor,
                               config.ipu.recompute_checkpoint_every_layer)
    initialize(graph, config.model.initializer_range, config.training.seed)
    optimizer, training = config.optimizer, config.training
    rows = training.micro_batch_size or MICRO_BATCH_VALUES[device] // (config.data.sequence_length * config.model.hidden_size)
    return TorchEngine(graph, lamb_groups(graph.named_parameters(), optimizer.weight_decay), device, optimizer.betas, optimizer.eps,
                       training.seed, max(1, min(rows, training.global_batch_size)), training.precision, training.compile,
                       graph.bert.encoder["layer"])


def make_shards_from_text(config: Config) -> None:
    """Makes the shards from data.text where data.files match nothing yet."""
    data = config.data
    if any(glob.glob(pattern) for pattern in data.files):
        return
    if not data.text:
        folder = os.path.dirname(data.files[0]) if data.files else "shards"
        raise InputError(
            "data.files: no file matches %s. Make the shards from text, one sentence or paragraph a line, a blank line between "
            "documents:\n  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt --sequence-length %d --mask-tokens %d "
            "--output %s/\n(without --vocab it trains a vocabulary), or name shards with --data.files" % (
                ", ".join(repr(pattern) for pattern in data.files) or "anything: it is empty",
                data.sequence_length, data.mask_tokens, folder))
    folder = os.path.dirname(data.files[0]) if data.files else ""
    if not folder or os.path.basename(data.files[0]) != "train-*.h5" or len(data.files) != 1:
        raise InputError("data.files is %s, expected one pattern FOLDER/train-*.h5, which says where the shards made from data.text go" %
                         json.dumps(data.files))
    summary = prepare(input=data.text, output=folder, format=data.text_format, vocab=data.vocab, vocab_size=config.model.vocab_size,
                      sequence_length=data.sequence_length, mask_tokens=data.mask_tokens, duplicates=data.duplicates,
                      held_out=data.held_out, seed=config.training.seed)
    say(str(summary))


def open_data(config: Config) -> Tuple[List[ShardInfo], List[str]]:
    """(the training shards, the vocabulary's words), checked against the config and each other."""
    data = config.data
    shards = open_shards(data.files, data.sequence_length, data.mask_tokens, config.model.vocab_size)
    if data.held_out_files:
        open_shards(data.held_out_files, data.sequence_length, data.mask_tokens, config.model.vocab_size)
    path = data.vocab or os.path.join(os.path.dirname(shards[0].path), "vocab.txt")
    if not os.path.exists(path):
        raise InputError("%s: no such vocabulary. Name the one that the shards were made with: --data.vocab vocab.txt" % path)
    words = read_vocab(path)
    if vocab_sha256(words) != shards[0].vocab_sha256:
        raise InputError("%s: its words have the hash %s, %s was made with %s. Name the vocabulary of the shards: --data.vocab" % (
            path, vocab_sha256(words)[:12], shards[0].path, shards[0].vocab_sha256[:12]))
    return shards, words


def find_run(config: Config, data_set: Dict) -> Optional[str]:
    """The checkpoint to continue from, None to begin. Raises InputError where the output folder holds another run."""
    folder = config.training.output
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        if os.path.isdir(os.path.join(folder, "checkpoints")):
            raise InputError("%s: has checkpoints but no run.json; expected an empty folder, or a run of this project. Choose another "
                             "with --training.output" % folder)
        return None
    if config.resume == "never":
        raise InputError("%s: holds a run already. Continue it with --resume auto, or choose another folder with --training.output" % folder)
    with open(path, encoding="utf-8") as file:
        other = json.load(file)
    own = course(config)
    for key in own:
        if other.get(key) != own[key]:
            raise InputError("%s: is another config's run: %s is %s there, expected %s. Choose another folder with --training.output" % (
                path, key, json.dumps(other.get(key)), json.dumps(own[key])))
    checkpoints = list_checkpoints(os.path.join(folder, "checkpoints"))
    if not checkpoints:
        return None
    state, _ = load_training_state(checkpoints[-1])
    if state["data_set"] != data_set:
        raise InputError("%s: was trained on another data set: %s there, found %s. Name the same shards with --data.files" % (
            checkpoints[-1], json.dumps(state["data_set"]), json.dumps(data_set)))
    return checkpoints[-1]


def course(config: Config) -> Dict:
    """The settings that decide where a run goes; the others (device, micro-batch, logging ...) may change when it continues."""
    values = dataclasses.asdict(config)
    keys = [("model", key) for key in values["model"]] + [("optimizer", key) for key in values["optimizer"]]
    keys += [("training", key) for key in ("global_batch_size", "max_steps", "seed", "start_from")]
    keys += [("data", key) for key in ("sequence_length", "mask_tokens")]
    return {"%s.%s" % (section, key): values[section][key] for section, key in keys}


def start_run_folder(config: Config, step: int) -> None:
    """Writes run.json and cuts metrics.jsonl back to `step`: what came after will come again."""
    folder = config.training.output
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "run.json"), course(config))
    path = os.path.join(folder, "metrics.jsonl")
    if os.path.exists(path):
        kept = [one for one in read_metrics(path) if one["step"] <= step]
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in kept)
        os.replace(path + ".new", path)


def load_weights_into(engine, path: str, config: Config, complete: bool) -> None:
    expected = engine.weights()
    weights = load_weights(path, expected, config.model)
    fresh = [name for name in expected if name not in weights]
    if complete and fresh:
        raise InputError("%s: %s is missing, and %d more" % (path, fresh[0], len(fresh) - 1))
    engine.load_weights(weights)
    if not complete:
        say("starts from %s%s" % (path, "; not in it, so newly initialised: %s" % ", ".join(fresh) if fresh else ""))


def summarize(recent: List[Dict], step: int, learning_rate: float, global_batch_size: int, seconds: float, waited: float) -> Dict:
    """The line of metrics.jsonl for the steps in `recent`: plain means over them."""
    means = {name: torch.stack([one[name] for one in recent]).double().mean().item() for name in METRICS}
    return {"step": step, "loss": means["mlm_loss"] + means["nsp_loss"], **means, "learning_rate": learning_rate,
            "sequences_per_second": len(recent) * global_batch_size / seconds, "data_wait_fraction": waited / seconds,
            "samples_seen": step * global_batch_size}


def console_line(line: Dict, last: int, seconds_per_step: float) -> str:
    left = (last - line["step"]) * seconds_per_step
    return ("step %d/%d  loss %.3f  mlm %.3f (%.1f %%)  nsp %.3f (%.1f %%)  lr %.2e  %.1f seq/s  data wait %.1f %%  %s left" % (
        line["step"], last, line["loss"], line["mlm_loss"], 100 * line["mlm_accuracy"], line["nsp_loss"], 100 * line["nsp_accuracy"],
        line["learning_rate"], line["sequences_per_second"], 100 * line["data_wait_fraction"], duration(left)))


def duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if seconds < 120:
        return "%d s" % math.ceil(seconds)
    return "%d min" % minutes if minutes < 120 else "%d h %d min" % divmod(minutes, 60)


def check_finite(metrics: Dict, step: int) -> None:
    if not all(math.isfinite(metrics[name].item()) for name in ("mlm_loss", "nsp_loss")):
        raise Diverged("step %d: the MLM loss is %f, the NSP loss is %f. Continue from the last checkpoint with a lower "
                       "optimizer.learning_rate or a longer optimizer.warmup_ratio" % (
                           step, metrics["mlm_loss"].item(), metrics["nsp_loss"].item()))


def finish(config: Config, engine) -> None:
    """The picture, the held-out evaluation, and where the checkpoint is."""
    folder = config.training.output
    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    draw_curve(metrics, os.path.join(folder, "curve.png"), os.path.basename(folder))
    if config.data.held_out_files:
        held_out = evaluate(config, engine)
        write_json(os.path.join(folder, "held_out.json"), held_out)
        say("held out (%d samples): loss %.3f  mlm %.3f (%.1f %%)  nsp %.3f (%.1f %%)" % (
            held_out["samples"], held_out["loss"], held_out["mlm_loss"], 100 * held_out["mlm_accuracy"],
            held_out["nsp_loss"], 100 * held_out["nsp_accuracy"]))
    checkpoint = list_checkpoints(os.path.join(folder, "checkpoints"))[-1]
    say("metrics and picture: %s/metrics.jsonl, %s/curve.png\ncheckpoint: AutoModel.from_pretrained(%r)" % (folder, folder, checkpoint))


def evaluate(config: Config, engine) -> Dict:
    """The metrics over all held-out samples, without dropout."""
    totals, masked, samples = dict.fromkeys(METRICS, 0.0), 0, 0
    shards = open_shards(config.data.held_out_files)
    with tqdm(total=sum(shard.num_samples for shard in shards), unit="seq", desc="evaluating", disable=None, leave=False) as bar:
        data = config.data
        for batch in batches_in_order(data.held_out_files, 256, data.sequence_length, data.mask_tokens, config.model.vocab_size):
            found = engine.evaluate(batch.arrays)
            for name in METRICS:
                totals[name] += found[name].item() * (batch.masked_tokens if name.startswith("mlm") else batch.samples)
            masked, samples = masked + batch.masked_tokens, samples + batch.samples
            bar.update(batch.samples)
    means = {name: totals[name] / max(1, masked if name.startswith("mlm") else samples) for name in METRICS}
    return {"step": engine.steps_done, "samples": samples, "loss": means["mlm_loss"] + means["nsp_loss"], **means}


def say(line: str) -> None:
    tqdm.write(line)
