"""A run: shards -> loader -> engine -> metrics and checkpoints, from the first step or from where it stopped."""

import collections
import contextlib
import dataclasses
import glob
import json
import math
import os
import sys
import tempfile
import time
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from tqdm import tqdm

from bert.config import Config, learning_rate_at, samples_per_row, validate_for_ipu
from bert.engines import choose_device
from bert.engines.ipu import METRICS, IpuEngine, process
from bert.engines.micro_batch import full_rows, largest_that_fits, peak_memory
from bert.engines.torch_engine import TorchEngine
from bert.errors import Diverged
from bert.model.graph import BertForPretraining, initialize
from bert.model.stages import make_stages
from bert.run.checkpoint import list_checkpoints, load_moments, load_weights, read_json, save_checkpoint, write_json
from bert.run.curve import draw_curve, read_metrics
from bert.run.run_folder import claim, find_checkpoint
from bert.signals import interruptible, protected
from data.errors import InputError, LoaderDied
from data.loading.loader import GlobalBatch, Loader, LoaderSettings, batches_in_order
from data.loading.shard_files import open_shards
from data.prepare import PrepareOptions, prepare
from data.rows import RowShape
from data.shards import ShardInfo
from data.tokenizer import find_vocab, read_vocab, vocab_sha256

__all__ = ["make_engine", "train"]

# Values of a micro-batch's hidden state [rows, length, hidden] where the config leaves its size open. On the CPU 4 MB
# of them stay near the caches; on CUDA more than this make nothing faster.
MICRO_BATCH_VALUES = {"cpu": 2**20, "cuda": 96 * 2**20}


def train(config: Config) -> int:
    """Runs `config` to its end and returns the number of steps done.

    Raises InputError before the first step for anything in config or files that cannot be used; Diverged for a loss
    that is no number; KeyboardInterrupt for Ctrl-C and SIGTERM, InputError for shards that turn bad and LoaderDied,
    each after saving a checkpoint.
    """
    with interruptible(), contextlib.ExitStack() as closing:
        device, device_line = find_device(config)
        if config.compile_only:
            make_engine(config, device).compile()
            say(f"compiled into {config.ipu.executable_cache_dir}")
            return 0
        index = process()[0] if device == "ipu" else 0
        checkpoint = find_checkpoint(config, index)
        drawn = os.path.exists(os.path.join(config.training.output, "curve.png"))
        if index:
            config = closing.enter_context(quiet(config))
        make_shards_from_text(config)
        shards, words, skipped = open_data(config)
        data_set = {
            "shards": [[os.path.basename(shard.path), shard.num_samples] for shard in shards],
            "vocab_sha256": vocab_sha256(words),
        }
        state = read_state(checkpoint, data_set, config.data.on_bad_shard == "skip")
        state["skipped"].update(skipped)
        last = min(config.training.max_steps, config.training.stop_at_step or config.training.max_steps)
        if state["step"] >= last and (last < config.training.max_steps or drawn):
            say(f"{config.training.output}: step {state['step']} of {last} is done already, nothing to do")
            return state["step"]
        loader = closing.enter_context(open_loader(config, shards, state, device))
        engine = make_engine(config, device)
        if state["step"] % engine.steps_per_call:
            raise InputError(
                f"ipu.device_iterations is {engine.steps_per_call}, expected a divisor of {state['step']}, "
                f"the step of {checkpoint}. Go on with --ipu.device_iterations 1, or from a checkpoint whose "
                "step it divides"
            )
        if checkpoint:
            load_weights_into(engine, checkpoint, config, words, complete=True)
            engine.load_optimizer_state(load_moments(checkpoint), state.get("skipped_updates", 0))
            engine.steps_done = state["step"]
        elif config.training.start_from:
            load_weights_into(engine, config.training.start_from, config, words, complete=False)
        first = next_batch(loader, engine.steps_per_call)
        if device == "cuda" and not config.training.micro_batch_size:
            engine.cut_evenly(len(first.arrays["input_ids"]))
        say_what_runs(config, device_line, engine, shards, first, checkpoint)
        closing.enter_context(claim(config, engine.steps_done))
        run_steps(config, engine, loader, first, words, state, data_set, last)
        if engine.steps_done == config.training.max_steps:
            finish(config, engine)
    return engine.steps_done


def run_steps(
    config: Config, engine, loader: Loader, batch: GlobalBatch, words: List[str], state: Dict, data_set: Dict, last: int
) -> None:
    """The training loop: from the engine's step to the last one, with metrics, checkpoints, and one more when it is
    stopped."""
    from torch.utils.tensorboard import SummaryWriter

    training, folder = config.training, config.training.output
    samples_seen, position, saved = state["samples_seen"], state["position"], engine.steps_done
    skipped = {}  # shards left out, and why
    # Metrics of the steps since the last line; those of steps before a resume come from its checkpoint.
    recent = [{name: torch.tensor(value) for name, value in one.items()} for one in state["recent"]]

    def save() -> None:
        nonlocal saved
        weights, moments = engine.weights(), engine.optimizer_state()  # of all processes together
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            raise diverged(config, engine.steps_done, "weights are not finite")
        if engine.index:
            saved = engine.steps_done
            return
        with protected():
            path = save_checkpoint(
                os.path.join(folder, "checkpoints"),
                engine.steps_done,
                weights,
                moments,
                config.model,
                words,
                {
                    "step": engine.steps_done,
                    "samples_seen": samples_seen,
                    "position": position,
                    "skipped": skipped,
                    "skipped_updates": engine.skipped_updates(),
                    "data_set": data_set,
                    "recent": [{name: one[name].item() for name in METRICS} for one in recent],
                    "config": dataclasses.asdict(config),
                },
                training.keep_checkpoints,
            )
            saved = engine.steps_done
        say(f"saved {path}")

    due = None  # a line of metrics to write: step, learning rate, samples seen, metrics of its steps, samples of them

    def write_line() -> None:
        """Writes the line that is due to the log, TensorBoard and the console."""
        nonlocal due, since, waited
        step, learning_rate, seen, metrics, samples = due
        engine.wait_for(step)
        means = {name: sum(one[name].item() for one in metrics) / len(metrics) for name in METRICS}
        seconds = time.perf_counter() - since
        line = {
            "step": step,
            "loss": means["mlm_loss"] + means["nsp_loss"],
            **means,
            "learning_rate": learning_rate,
            "sequences_per_second": samples / seconds,
            "data_wait_fraction": waited / seconds,
            "samples_seen": seen,
            "skipped_updates": int(metrics[-1]["skipped_updates"]),
        }
        if not math.isfinite(line["loss"]):
            raise diverged(config, step, f"the MLM loss is {line['mlm_loss']:f}, the NSP loss is {line['nsp_loss']:f}")
        with protected():
            log.write(json.dumps(line) + "\n")
            log.flush()
            due = None
        for name in line:
            if name not in ("step", "samples_seen"):
                board.add_scalar(name, line[name], step)
        say(console_line(line, last, (last - step) * seconds / (len(metrics) * engine.steps_per_call)))
        since, waited = time.perf_counter(), 0.0

    bar = tqdm(
        total=last,
        initial=engine.steps_done,
        disable=None,
        dynamic_ncols=True,
        desc="training",
        bar_format="{desc}: {percentage:.1f} %|{bar}| step {n:.2f} of {total_fmt}, {elapsed} gone, {remaining} to go",
    )
    with bar, SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=engine.steps_done + 1) as board, open(
        os.path.join(folder, "metrics.jsonl"), "a", encoding="utf-8"
    ) as log:
        try:
            since, waited, samples = time.perf_counter(), 0.0, 0
            while engine.steps_done < last:
                step = engine.steps_done + engine.steps_per_call
                learning_rate = learning_rate_at(step, config.optimizer, training.max_steps)
                rows_of_step = len(batch.arrays["input_ids"])

                def progress(rows: int) -> None:
                    bar.update(engine.steps_per_call * rows / rows_of_step)
                    loader.check()

                with protected():  # but for the engine's forward and backward passes, which may be cut short
                    recent.append(engine.step(batch.arrays, learning_rate, step, progress))
                    samples_seen, position, samples = (
                        samples_seen + batch.samples,
                        batch.position,
                        samples + batch.samples,
                    )
                    new, skipped = set(batch.skipped) - set(skipped), batch.skipped
                for path in new:
                    say(f"left out, {len(skipped)} by now: {skipped[path]}")
                if due:  # the line of the step before: while it is read and written, the device works on this one
                    write_line()
                saving = step % training.save_every == 0 or step == last
                if step % training.log_every == 0 or step == training.max_steps:
                    with protected():
                        due, recent, samples = (step, learning_rate, samples_seen, recent, samples), [], 0
                    if saving or not engine.asynchronous:
                        write_line()
                if saving:
                    engine.wait_for(step)  # else the device's time for the step would count as saving's
                    before = time.perf_counter()
                    save()
                    since += time.perf_counter() - before
                if step < last:
                    before = time.perf_counter()
                    batch = next_batch(loader, engine.steps_per_call)
                    waited += time.perf_counter() - before
        except (KeyboardInterrupt, InputError, LoaderDied):
            if due:
                write_line()
            if engine.steps_done > saved and engine.processes == 1:  # several may have been stopped at different steps
                engine.wait_for(engine.steps_done)
                save()
            say(
                f"stopped after step {engine.steps_done} of {training.max_steps}. To go on from step {saved}: "
                "the same command with --resume auto"
            )
            raise


@contextlib.contextmanager
def quiet(config: Config) -> Iterator[Config]:
    """The config of one of poprun's processes that is not the first, which alone writes the run's folder and says what
    happens: with a folder that vanishes. Raises InputError where shards are still to be made."""
    if config.data.text:
        raise InputError(
            "data.text is set, and poprun started several processes. Make the shards before, with python -m data.prepare, and "
            "leave data.text out"
        )
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield dataclasses.replace(config, training=dataclasses.replace(config.training, output=folder))


def next_batch(loader: Loader, count: int) -> GlobalBatch:
    """The next `count` global batches, one after the other in one."""
    if count == 1:
        return loader.next()
    arrays, counts = [], collections.Counter()
    for _ in range(count):
        batch = loader.next()
        arrays.append(
            {name: array.copy() for name, array in batch.arrays.items()}
        )  # the loader's memory is its own again with the next
        counts.update(batch.counts)
    together = {name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]}
    return GlobalBatch(together, counts, batch.position, batch.skipped)


def find_device(config: Config) -> Tuple[str, str]:
    """(device, line that says why), checked: an IPU asks more of a config than other devices."""
    ipus = len(config.ipu.layers_per_ipu) * config.ipu.replication_factor // process()[1]
    wanted = "ipu" if config.compile_only or config.ipu_model else config.device
    device, line = choose_device(wanted, ipus, needs_hardware=not (config.compile_only or config.ipu_model))
    if device == "ipu":
        try:
            validate_for_ipu(config)
        except InputError as error:
            raise InputError(f"{error}. To train without the IPUs that are here: --device cuda or --device cpu")
    return device, line


def make_engine(config: Config, device: str):
    """The engine for `device`, its graph initialised from the seed."""
    stages = make_stages(config.ipu.layers_per_ipu, config.ipu.matmul_proportion)
    graph = BertForPretraining(
        config.model,
        stages,
        config.ipu.embedding_serialization_factor,
        config.ipu.recompute_checkpoint_every_layer,
        config.training.precision == "float8",
    )
    initialize(graph, config.model.initializer_range, config.training.seed)
    data, optimizer, training = config.data, config.optimizer, config.training
    if device == "ipu":
        shape = RowShape.of(data.sequence_length, data.mask_tokens, samples_per_row(config, device))
        layout = shape.layout(training.global_batch_size)
        return IpuEngine(
            graph,
            stages,
            config.ipu,
            layout,
            optimizer.weight_decay,
            optimizer.betas,
            optimizer.eps,
            training.seed,
            training.precision,
            config.compile_only,
            config.ipu_model,
        )
    most = MICRO_BATCH_VALUES[device] // (data.sequence_length * config.model.hidden_size)
    rows = max(1, min(training.micro_batch_size or most, training.global_batch_size))
    head_size = config.model.hidden_size // config.model.num_attention_heads
    engine = TorchEngine(
        graph,
        device,
        head_size,
        optimizer.weight_decay,
        optimizer.betas,
        optimizer.eps,
        training.seed,
        rows,
        training.precision,
        training.compile,
        graph.bert.encoder["layer"],
    )
    if device == "cuda" and not training.micro_batch_size:
        shape = RowShape.of(data.sequence_length, data.mask_tokens, samples_per_row(config, device))
        moments = 8 * sum(master.numel() for master in engine.masters.values())
        free, _ = torch.cuda.mem_get_info()
        available = int(0.9 * (free + torch.cuda.memory_reserved())) - moments
        engine.micro_batch_size = largest_that_fits(
            lambda rows: peak_memory(engine, full_rows(rows, *shape)), available, rows
        )
        if not engine.micro_batch_size:
            raise InputError(
                f"not even a micro-batch of one row of {data.sequence_length} tokens fits into the "
                f"{available / 1e9:.1f} GB that are free on {torch.cuda.get_device_name()}. Use a card with "
                "more memory, or a smaller model"
            )
    return engine


def make_shards_from_text(config: Config) -> None:
    """Makes the shards from data.text where data.files match nothing yet."""
    data = config.data
    found = sum(len(glob.glob(pattern)) for pattern in data.files)
    if found:
        if data.text:
            say(f"data.text is not read: data.files has {found} shards already")
        return
    folder = os.path.dirname(data.files[0]) if data.files else ""
    if not data.text:
        raise InputError(
            "data.files: no file matches "
            f"{', '.join(repr(pattern) for pattern in data.files) or 'anything: it is empty'}. Make the "
            "shards from text, one sentence or paragraph a line, a blank line between documents; in the "
            "project's folder:\n  python -m data.prepare --input 'corpus/*.txt' --vocab vocab.txt "
            f"--sequence-length {data.sequence_length} --mask-tokens {data.mask_tokens} --output "
            f"{folder if folder and (not glob.has_magic(folder)) else 'shards'}/\n(without --vocab it trains "
            f"one of --vocab-size {config.model.vocab_size}), or name shards with --data.files"
        )
    if not folder or os.path.basename(data.files[0]) != "train-*.h5" or len(data.files) != 1:
        raise InputError(
            f"data.files is {json.dumps(data.files)}, expected one pattern FOLDER/train-*.h5, which says "
            "where the shards made from data.text go"
        )
    try:
        options = PrepareOptions(
            input=data.text,
            output=folder,
            format=data.text_format,
            vocab=data.vocab,
            vocab_size=config.model.vocab_size,
            sequence_length=data.sequence_length,
            mask_tokens=data.mask_tokens,
            nsp=config.task.nsp,
            duplicates=data.duplicates,
            held_out=data.held_out,
            seed=config.training.seed,
        )
        summary = prepare(options)
    except InputError as error:
        raise InputError(f"data.text: {error}")
    say(str(summary))


def open_data(config: Config) -> Tuple[List[ShardInfo], List[str], Dict[str, str]]:
    """(the training shards, the vocabulary's words, shards left out and why), checked against the config and each
    other, held-out samples one by one."""
    data = config.data
    expected = (data.sequence_length, data.mask_tokens, config.model.vocab_size)
    skipped = {}
    shards = open_shards(data.files, *expected, skipped=skipped if data.on_bad_shard == "skip" else None)
    words, path = find_vocab(data.vocab, shards, "--data.vocab")
    if len(words) > config.model.vocab_size:
        raise InputError(
            f"{path}: has {len(words)} words, model.vocab_size is {config.model.vocab_size}. Set "
            f"model.vocab_size to {len(words)}"
        )
    if data.held_out_files:
        held_out = open_shards(data.held_out_files, *expected)
        find_vocab(path, held_out, "--data.vocab")
        both = {os.path.realpath(shard.path) for shard in shards} & {os.path.realpath(shard.path) for shard in held_out}
        if both:
            raise InputError(
                f"{sorted(both)[0]}: is named by data.files and by data.held_out_files; expected different "
                "files: --data.files '.../train-*.h5' and --data.held_out_files '.../held_out-*.h5'"
            )
        for _ in batches_in_order(held_out, 4096):
            pass
    return shards, words, skipped


def open_loader(config: Config, shards: List[ShardInfo], state: Dict, device: str) -> Loader:
    data, training = config.data, config.training
    packing = data.packing
    if packing == "auto":  # the same samples either way; an IPU's shapes are static
        packing = "off" if device == "ipu" else "samples"
    settings = LoaderSettings(
        batch_size=training.global_batch_size,
        seed=training.seed,
        packing=packing,
        samples_per_row=data.samples_per_row,
        skip_bad=data.on_bad_shard == "skip",
        workers=min(data.workers, os.cpu_count() or 1),
    )
    return Loader(shards, settings, state["position"], state["skipped"])


def read_state(checkpoint: Optional[str], data_set: Dict, may_lack_shards: bool) -> Dict:
    """Where to begin: step, samples seen, position in the data set, shards left out, and the metrics of steps that are
    not in metrics.jsonl yet."""
    if checkpoint is None:
        return {"step": 0, "samples_seen": 0, "position": 0, "skipped": {}, "recent": []}
    state = read_json(os.path.join(checkpoint, "training_state.json"))
    there, here = [{tuple(shard) for shard in one["shards"]} for one in (state["data_set"], data_set)]
    same_words = state["data_set"]["vocab_sha256"] == data_set["vocab_sha256"]
    if same_words and there != here and may_lack_shards and (there < here or here < there):
        epoch = state["position"] // sum(count for _, count in there)
        state["position"] = (epoch + 1) * sum(count for _, count in here)
        say(
            f"{len(there & here)} of the checkpoint's {len(there)} shards are there, and {len(here - there)} "
            f"others: continues with their next epoch, the {epoch + 2}."
        )
    elif not same_words or there != here:
        found = (
            "the vocabulary differs"
            if not same_words
            else ", ".join(
                f"{verb} {name} of {count} samples"
                for verb, names in (("has", there - here), ("has not", here - there))
                for name, count in sorted(names)[:1]
            )
        )
        raise InputError(
            f"{checkpoint}: was trained on another data set: it {found}. Name the same shards with --data.files"
        )
    return state


def load_weights_into(engine, path: str, config: Config, words: List[str], complete: bool) -> None:
    expected = dict(engine.graph.named_parameters())
    weights = load_weights(path, expected, config.model)
    fresh = [name for name in expected if name not in weights]
    if complete and fresh:
        raise InputError(
            f"{path}: {fresh[0]} is missing, and {len(fresh) - 1} more. Remove that folder to continue from "
            "the checkpoint before it"
        )
    vocabulary = os.path.join(path, "vocab.txt")
    if os.path.exists(vocabulary) and read_vocab(vocabulary) != words:
        raise InputError(
            f"{vocabulary}: differs from the vocabulary of the shards, which has the hash "
            f"{vocab_sha256(words)[:12]}. Make shards with it: python -m data.prepare --vocab {vocabulary} ..."
        )
    engine.load_weights(weights)
    if not complete and fresh:
        say(f"newly initialised, for {path} does not have them: {', '.join(fresh)}")


def say_what_runs(
    config: Config, device_line: str, engine, shards: List[ShardInfo], batch: GlobalBatch, checkpoint: Optional[str]
) -> None:
    """Lines for people: where it runs, on what, from where."""
    training, samples = config.training, sum(shard.num_samples for shard in shards)
    rows, length = batch.arrays["input_ids"].shape
    rows, samples_of_step = rows // engine.steps_per_call, batch.samples // engine.steps_per_call
    say(f"device: {device_line}, {engine.describe()}")
    say(
        f"global batch: {samples_of_step} samples in {rows} rows of {length}, "
        f"{100 * (batch.arrays['sample_ids'] > 0).mean():.1f} % of the slots filled, "
        f"{-(-rows // engine.micro_batch_size)} micro-batches"
    )
    say(
        f"data: {samples} samples in {len(shards)} shards; {training.max_steps} steps are "
        f"{training.max_steps * samples_of_step / samples:.2f} epochs"
    )
    if checkpoint or training.start_from:
        say(f"{'continues from' if checkpoint else 'starts from'} {checkpoint or training.start_from}")


def console_line(line: Dict, last: int, seconds_left: float) -> str:
    return (
        "step %d/%d  loss %.3f  mlm %.3f (%.1f %%)  nsp %.3f (%.1f %%)  lr %.2e  %.1f seq/s  data wait %.1f "
        "%%%s  %s left"
    ) % (
        line["step"],
        last,
        line["loss"],
        line["mlm_loss"],
        100 * line["mlm_accuracy"],
        line["nsp_loss"],
        100 * line["nsp_accuracy"],
        line["learning_rate"],
        line["sequences_per_second"],
        100 * line["data_wait_fraction"],
        "  %d updates skipped" % line["skipped_updates"] if line["skipped_updates"] else "",
        duration(seconds_left),
    )


def duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    if minutes < 48 * 60:
        return f"{minutes} min" if minutes < 120 else "%d h %d min" % divmod(minutes, 60)
    days, hours = divmod(math.ceil(seconds / 3600), 24)
    return f"{days:,} days {hours} h"


def diverged(config: Config, step: int, what: str) -> Diverged:
    checkpoints = list_checkpoints(os.path.join(config.training.output, "checkpoints"))
    return Diverged(
        "step %d: %s. Begin again with a lower optimizer.learning_rate or a longer optimizer.warmup_ratio, in another "
        "--training.output%s" % (step, what, ", from --training.start_from %s" % checkpoints[-1] if checkpoints else "")
    )


def finish(config: Config, engine) -> None:
    """The held-out evaluation, the picture (last: it says that a run is finished), and where the checkpoint is."""
    folder = config.training.output
    held_out = evaluate(config, engine) if config.data.held_out_files else None
    if engine.index:
        return
    if held_out:
        write_json(os.path.join(folder, "held_out.json"), held_out)
        say(
            f"held out ({held_out['samples']} samples): loss {held_out['loss']:.3f}  mlm "
            f"{held_out['mlm_loss']:.3f} ({100 * held_out['mlm_accuracy']:.1f} %)  nsp "
            f"{held_out['nsp_loss']:.3f} ({100 * held_out['nsp_accuracy']:.1f} %)"
        )
    draw_curve(
        read_metrics(os.path.join(folder, "metrics.jsonl")), os.path.join(folder, "curve.png"), os.path.basename(folder)
    )
    checkpoint = list_checkpoints(os.path.join(folder, "checkpoints"))[-1]
    say(
        f"metrics and picture: {folder}/metrics.jsonl, {folder}/curve.png\ncheckpoint: "
        f"AutoModel.from_pretrained({checkpoint!r})"
    )


def evaluate(config: Config, engine) -> Dict:
    """The metrics over all held-out samples, without dropout."""
    data, totals, counts = config.data, dict.fromkeys(METRICS, 0.0), collections.Counter()
    shards = open_shards(data.held_out_files, data.sequence_length, data.mask_tokens, config.model.vocab_size)
    with tqdm(
        total=sum(shard.num_samples for shard in shards), unit="seq", desc="evaluating", disable=None, leave=False
    ) as bar:
        for batch in batches_in_order(shards, max(256, engine.micro_batch_size)):
            found = engine.evaluate(batch.arrays)
            for name in METRICS:
                totals[name] += found[name].item() * batch.counts[weights_of(name)]
            counts.update(batch.counts)
            bar.update(batch.samples)
    means = {name: totals[name] / max(1, counts[weights_of(name)]) for name in METRICS}
    return {
        "step": engine.steps_done,
        "samples": counts["nsp_weights"],
        "loss": means["mlm_loss"] + means["nsp_loss"],
        **means,
    }


def weights_of(metric: str) -> str:
    return "mlm_weights" if metric.startswith("mlm") else "nsp_weights"


def say(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()  # a log file should show where the run is
