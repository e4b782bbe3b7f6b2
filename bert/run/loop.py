"""A run: shards -> loader -> engine -> metrics and checkpoints, from the first step or from where it stopped."""

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from typing import Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch
from tqdm import tqdm

from bert.config import Config
from bert.engines import (
    Engine,
    check_processes,
    evaluated_part,
    find_device,
    has_static_shapes,
    make_engine,
    makes_up_input,
    process_of,
)
from bert.engines.parallel.processes import current, failing_together, first_alone, joined, torchruns
from bert.errors import Diverged, ProcessLost, said_once_a_machine
from bert.model.model import Model
from bert.optimizers import check_name
from bert.run.checkpoint import (
    check_model,
    list_checkpoints,
    load_optimizer_state,
    load_weights,
    mark_best,
    save_checkpoint,
    transformers_config,
)
from bert.run.console import bar_width, show_errors_only
from bert.run.curve import draw_curve, read_metrics
from bert.run.data_set import (
    BatchSource,
    DataSet,
    make_shards_from_text,
    next_batch,
    open_shard_set,
    sharing_loader,
)
from bert.run.evaluation import is_due, is_out_of_patience, note_evaluation, recall_evaluations
from bert.run.example_set import ExampleSet
from bert.run.extending import check_max_steps, find_branch, read_branch
from bert.run.handshake import check_same_data, check_same_settings, check_same_weights, note_batch
from bert.run.metrics_log import MetricsLog
from bert.run.provenance import describe_session
from bert.run.run_folder import checkpoints_of, claim, find_checkpoint, is_begun_by, is_finished, mark_finished
from bert.run.sharded_checkpoint import SavesInBackground, write_model
from bert.run.state import RunState, read_state
from bert.schedules import learning_rate_at
from bert.signals import hold, interruptible, protected
from bert.start_from import adapting_line, check_head
from bert.tasks import ExampleTask, ShardTask, Task, make_model, make_task, with_labels
from data.errors import InputError, LoaderDied
from data.files import write_json
from data.loading.loader import GlobalBatch
from data.loading.sharing import LocalRanks
from data.rows import Part
from data.tokenizer import claims_of_rules, read_vocab, vocab_sha256
from ops.shards import local_part

__all__ = ["Run", "check", "train"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """What the loop works with, and how far it is."""

    config: Config
    engine: Engine
    loader: BatchSource
    data_set: DataSet
    state: RunState
    part: Part
    """Which rows of a batch this process evaluates."""
    last_step: int
    """The step to stop after: the last of all, or training.stop_at_step."""
    saved_step: int
    """The step of the newest checkpoint."""
    saves: Optional[SavesInBackground]
    """Where `engine.sharded`."""

    def save(self) -> None:
        """Writes a checkpoint, a sharded one in the background, but none of what is made up. Raises Diverged where
        weights are not finite."""
        config, engine = self.config, self.engine
        if engine.made_up:
            return
        weights, optimizer_state = engine.weights(), engine.optimizer_state()  # of all processes together
        if not are_finite(weights, self.saves):
            raise Diverged(f"step {engine.steps_done}: weights are not finite")
        state = self.state.to_json(self.data_set.identity(), engine.skipped_updates(), list(engine.task.metrics))
        state["config"] = dataclasses.asdict(config)
        model, vocabulary = describe_model(config, engine.model, engine.task), self.data_set.vocabulary
        keep = config.training.keep_checkpoints
        values = (checkpoints_of(config), state, weights, optimizer_state, model, vocabulary, keep)
        with protected():
            if self.saves:
                self.saves.start(*values)
            elif engine.rank == 0:
                logger.info("saved %s", save_checkpoint(*values))
            self.saved_step = engine.steps_done

    def evaluate(self, log: MetricsLog) -> None:
        """Evaluates on the held-out samples, and keeps the checkpoint of the best evaluation so far."""
        held_out = self.data_set.evaluate(self.config, self.engine, self.part)
        is_best = note_evaluation(self.state, held_out, self.engine.task.selected_by)
        if is_best and self.engine.rank == 0:
            self.data_set.report(self.config.training.output)
        is_saved = self.saved_step == self.engine.steps_done
        if is_best and is_saved:
            if self.saves:
                self.saves.wait()
            if self.engine.rank == 0:
                mark_best(checkpoints_of(self.config), self.state.best, self.config.training.keep_checkpoints)
        # After what belongs to it: a resumed run takes an evaluation whose line is there for done.
        log.write_held_out(held_out, is_best)
        if is_best and not is_saved:
            self.save()

    def is_over(self) -> bool:
        """Whether no step is left to do."""
        return self.engine.steps_done >= self.last_step or is_out_of_patience(self.config, self.state)

    def is_complete(self) -> bool:
        """Whether the schedule is done, or no evaluation is better any more."""
        is_last = self.engine.steps_done == self.config.training.max_steps
        return is_last or is_out_of_patience(self.config, self.state)

    def save_last(self, reason: BaseException) -> None:
        """Saves as the run stops, if it can: all processes have to write shards, and stop at one step by a signal
        alone."""
        together = self.saves is None or isinstance(reason, KeyboardInterrupt)
        if self.engine.steps_done > self.saved_step and self.engine.stops_together and together:
            self.engine.wait_for(self.engine.steps_done)
            self.save()
        if self.saves and together:
            self.saves.wait()
        elif self.saves:
            self.saves.end()
            self.saved_step = self.saves.saved_step


def are_finite(weights: Dict[str, torch.Tensor], saves: Optional[SavesInBackground]) -> bool:
    """Whether all weights are finite, in all processes where each has a part."""
    broken = not all(torch.isfinite(local_part(tensor)).all() for tensor in weights.values())
    return not (saves.processes.agree([broken])[0] if saves else broken)


def train(config: Config, make_model: Callable[[Config, Task], Model] = make_model) -> int:
    """Runs `config` to its end and returns the number of steps done.

    Raises InputError before the first step for anything in config or files that cannot be used; Diverged for a loss
    that is no number; ProcessesDiffer for processes that do not have alike what they must; KeyboardInterrupt for Ctrl-C
    and SIGTERM, InputError for shards that turn bad, LoaderDied, and ProcessLost for another process of the run that
    ended, each after saving a checkpoint. Of several processes on a machine one raises it, others SystemExit.
    """
    with interruptible(), contextlib.ExitStack() as closing:
        with said_once_a_machine():
            check_name(config.optimizer)
            device, device_line = find_device(config)
        if process_of(device)[0]:
            show_errors_only()
        if config.compile_only:
            make_engine(with_labels(config), device, make_model).compile()
            logger.info("compiled into %s", config.ipu.executable_cache_dir)
            return 0
        closing.enter_context(joined(device, config.parallel.timeout))
        with failing_together():
            check_same_settings(config, device)
            check_processes(config, device)
        with failing_together():
            source = find_source(config, device, make_model, closing)
        with failing_together(), sharing_loader(config, device) as local:
            begun = begin(source, device, device_line, local, make_model, closing)
        if isinstance(begun, int):
            return begun
        run, first = begun
        together = run.engine.stops_together and run.engine.world_size > 1
        with protected() if together else contextlib.nullcontext():  # the engine looks for a signal, for all of them
            try:
                run_steps(run, first)
                if run.is_complete() and not run.engine.made_up:
                    finish(run)
                if together:  # nothing is left that others would have to stop with
                    hold()
            except BaseException as error:
                if together:  # torchrun sends SIGTERM as soon as another process has ended
                    hold()
                if isinstance(error, Diverged):
                    raise Diverged(f"{error}. {advice_for_divergence(config)}")
                raise
    return run.engine.steps_done


def check(config: Config) -> None:
    """Raises the InputError that `train` would for config and files, and trains nothing."""
    with contextlib.ExitStack() as closing:
        find_source(config, find_device(config)[0], make_model, closing)


class Source(NamedTuple):
    """Where a run goes on: the data set, and the checkpoint."""

    config: Config
    """with an output folder of its own where its input is made up"""
    data_set: DataSet
    checkpoint: Optional[str]
    state: RunState
    finished: bool


def find_source(
    config: Config, device: str, make_model: Callable[[Config, Task], Model], closing: contextlib.ExitStack
) -> Source:
    """Opens the data set, which is made from text where it is not there yet, and looks for the checkpoint."""
    rank, _ = process_of(device)
    config = with_labels(config)
    task = make_task(config)  # before shards are made: its name may be wrong
    if makes_up_input(config, device):  # it leaves no run, and goes on with none
        config = closing.enter_context(without_output(config))
    if rank and config.data.text and current() is None:  # those that poprun started cannot wait
        raise InputError(
            "data.text is set, and poprun started several processes. Make the shards before, with python -m "
            "data.prepare, and leave data.text out"
        )
    if is_begun_by(config, torchruns()):  # which started it again, after a fault or with other machines
        config = dataclasses.replace(config, resume="auto")
    checkpoint = find_checkpoint(config, rank)
    finished = is_finished(config)
    if config.training.start_from and not (checkpoint or config.training.branch_from):  # before shards are made
        with torch.device("meta"):
            model = make_model(config, task)
        described = describe_model(config, model, task)
        check_model(config.training.start_from, described)
        if isinstance(task, ExampleTask) and not config.task.new_head:
            check_head(config.training.start_from, task.architecture, described)
    branch = None if checkpoint else find_branch(config)
    data_set = open_data(config, task, device)
    config = with_epochs(config, data_set.samples, device)
    from_data_set = data_set.identity(), config.data.on_bad_shard == "skip"
    state = read_branch(branch, config, *from_data_set) if branch else read_state(checkpoint, *from_data_set)
    if checkpoint:
        recall_evaluations(state, os.path.join(config.training.output, "held_out.jsonl"), task.selected_by)
    if rank == 0:
        check_max_steps(config, state.step)
    state.leave_out(data_set.skipped)
    return Source(config, data_set, checkpoint or branch, state, finished)


def open_data(config: Config, task: Task, device: str) -> DataSet:
    """The data set of a task; shards are made from text where they are not there yet."""
    if isinstance(task, ExampleTask):
        return ExampleSet(config, task, device)
    assert isinstance(task, ShardTask)
    first_alone(lambda: make_shards_from_text(config))
    return open_shard_set(config, task)


def with_epochs(config: Config, samples: int, device: str) -> Config:
    """The config with the steps that training.epochs are, and an evaluation after each where none is asked for."""
    training = config.training
    if training.epochs is None:
        return config
    each, steps = samples / training.global_batch_size, training.evaluate_every
    if steps is None and config.data.held_out_files and not has_static_shapes(device):
        steps = math.ceil(each)
    a_call = config.ipu.device_iterations if has_static_shapes(device) else 1
    last = math.ceil(training.epochs * each / a_call) * a_call
    training = dataclasses.replace(training, max_steps=last, evaluate_every=steps)
    return dataclasses.replace(config, training=training)


def begin(
    source: Source,
    device: str,
    device_line: str,
    local: LocalRanks,
    make_model: Callable[[Config, Task], Model],
    closing: contextlib.ExitStack,
) -> Union[int, Tuple[Run, GlobalBatch]]:
    """The run and its first batch; where no step is left to do, how many are done."""
    config, data_set, checkpoint, state, finished = source
    check_same_data(data_set, checkpoint, state)
    last_step = min(config.training.max_steps, config.training.stop_at_step or config.training.max_steps)
    is_over = state.step >= last_step or is_out_of_patience(config, state)
    if is_over and (last_step < config.training.max_steps or finished):
        output = config.training.output
        logger.info("%s: step %d of %d is done already, nothing to do", output, state.step, last_step)
        return state.step
    loader = closing.enter_context(data_set.open_loader(config, state, device, local))
    engine = make_engine(config, device, make_model)
    load_into(engine, config, data_set, state, checkpoint)
    first = next_batch(loader, engine.steps_per_call)
    engine.expect_rows(len(first.arrays["input_ids"]))
    log_what_runs(config, device_line, engine, data_set, first, checkpoint)
    if engine.rank == 0:
        identity = data_set.identity()
        session = describe_session(config, engine.steps_done, device_line, engine.world_size, identity)
        closing.enter_context(claim(config, engine.steps_done, state.evaluated, torchruns(), session))
    part, processes, saves = evaluated_part(config, device), current(), None
    if engine.sharded and processes:
        saves = SavesInBackground(processes, config.parallel.timeout, engine.steps_done)
    return Run(config, engine, loader, data_set, state, part, last_step, engine.steps_done, saves), first


def run_steps(run: Run, batch: GlobalBatch) -> None:
    """The training loop, with metrics, checkpoints, and one more checkpoint when it is stopped."""
    engine, state, loader, training = run.engine, run.state, run.loader, run.config.training
    with progress_bar(run) as bar, MetricsLog(training.output, engine, run.last_step) as log:
        try:
            if is_due(run.config, engine.steps_done, state):  # a run that goes on was stopped before it
                with log.not_counted():
                    run.evaluate(log)
            while not run.is_over():
                step = engine.steps_done + engine.steps_per_call
                learning_rate = learning_rate_at(step, run.config.optimizer, training.max_steps)
                note_batch(batch)
                with protected():  # but for the engine's forward and backward passes, which may be cut short
                    metrics = engine.step(batch.arrays, learning_rate, step, follow(bar, batch, run))
                    state.advance(step, batch, metrics)
                    log.samples += batch.samples
                log.write()  # the line of the step before: meanwhile the device works on this one
                saving = step % training.save_every == 0 or step == run.last_step
                evaluating = is_due(run.config, step, state) and not engine.made_up
                if step % training.log_every == 0 or step == training.max_steps:
                    with protected():
                        log.end_line(step, learning_rate, state.samples_seen, state.take_recent())
                    if saving or evaluating or not engine.asynchronous:
                        log.write()
                if saving or evaluating:
                    engine.wait_for(step)  # else the device's time for the step would count as saving's
                    with log.not_counted():
                        check_same_weights(engine)
                        if saving:
                            run.save()
                        if evaluating:
                            run.evaluate(log)
                if not run.is_over():
                    with log.waiting_for_data():
                        batch = next_batch(loader, engine.steps_per_call)
            if run.saved_step < engine.steps_done and not engine.made_up:  # patience has ended
                run.save()
            if run.saves:
                run.saves.wait()
        except (KeyboardInterrupt, InputError, LoaderDied, ProcessLost) as reason:
            log.write()
            processes = current()
            if processes and not isinstance(reason, KeyboardInterrupt):
                processes.tell_before_saving(reason, run.saves is None)
            run.save_last(reason)
            go_on = f". To go on from step {run.saved_step}: the same command with --resume auto"
            stopped = f"stopped after step {engine.steps_done} of {training.max_steps}"
            logger.info("%s%s", stopped, "" if engine.made_up else go_on)
            raise


def progress_bar(run: Run) -> tqdm:
    """Of all steps; it moves within a step too."""
    form = "{desc}: {percentage:.1f} %|{bar}| step {n:.2f} of {total_fmt}, {elapsed} elapsed, {remaining} left"
    steps = dict(total=run.last_step, initial=run.engine.steps_done)
    quiet = True if run.engine.rank else None
    return tqdm(**steps, disable=quiet, ncols=bar_width(), desc="training", bar_format=form)


def follow(bar: tqdm, batch: GlobalBatch, run: Run) -> Callable[[int], None]:
    """What the engine calls as rows of a batch are done: moves the bar, and raises what the loader has to say."""
    steps_a_row = run.engine.steps_per_call / max(1, len(batch.arrays["input_ids"]))

    def progress(rows: int) -> None:
        bar.update(steps_a_row * rows)
        if rows > 0:  # not where a step that failed is taken back
            run.loader.check()

    return progress


@contextlib.contextmanager
def without_output(config: Config):
    """The config with an output folder that vanishes: for input that IPUs make up."""
    with tempfile.TemporaryDirectory() as folder:
        yield dataclasses.replace(config, training=dataclasses.replace(config.training, output=folder))


def load_into(engine: Engine, config: Config, data_set: DataSet, state: RunState, checkpoint: Optional[str]) -> None:
    """Gives a new engine the checkpoint of this run, or the weights to start from."""
    if state.step % engine.steps_per_call:
        raise InputError(
            f"ipu.device_iterations is {engine.steps_per_call}, expected a divisor of {state.step}, the step of "
            f"{checkpoint}. Go on with --ipu.device_iterations 1, or from a checkpoint whose step it divides"
        )
    if checkpoint:
        load_weights_into(engine, checkpoint, config, data_set, complete=True)
        weights = engine.weights() if engine.sharded else None
        engine.load_optimizer_state(load_optimizer_state(checkpoint, weights), state.skipped_updates)
        engine.steps_done = state.step
    elif config.training.start_from:
        load_weights_into(engine, config.training.start_from, config, data_set, complete=False)


def load_weights_into(engine: Engine, path: str, config: Config, data_set: DataSet, complete: bool) -> None:
    """Raises InputError for weights of another model or vocabulary, and, where they are to be `complete`, for missing
    ones."""
    expected = engine.weights() if engine.sharded else dict(engine.model.named_parameters())
    if config.task.new_head and not complete:
        expected = {name: tensor for name, tensor in expected.items() if name.startswith("bert.")}
    weights = load_weights(path, expected, describe_model(config, engine.model, engine.task))
    fresh = [name for name in expected if name not in weights]
    if complete and fresh:
        raise InputError(
            f"{path}: {fresh[0]} is missing, and {len(fresh) - 1} more. Remove that folder to continue from the "
            "checkpoint before it"
        )
    check_same_tokenizer(path, data_set, complete)
    engine.load_weights(weights)
    if not complete and fresh:
        logger.info("newly initialised, for %s does not have them: %s", path, ", ".join(fresh))


def check_same_tokenizer(path: str, data_set: DataSet, complete: bool) -> None:
    """Raises InputError where the folder of a model says that its text was tokenized otherwise than the shards' text.

    Where it is `complete`, a checkpoint of this run, only its tokens count: `read_state` has looked at the rest.
    """
    own = data_set.vocabulary
    if not any(os.path.exists(os.path.join(path, name)) for name in ("vocab.txt", "tokenizer.json")):
        return
    advice = f"Make shards with it: python -m data.prepare --vocab {path} ..."
    try:
        there = read_vocab(path, [] if complete else [claims_of_rules(own.rules, "the data of the run")])
    except InputError as error:
        raise InputError(f"{error}. {advice}")
    if there.tokens != own.tokens:
        hashed = vocab_sha256(own.tokens)[:12]
        differs = f"differs from the vocabulary of the shards, which has the hash {hashed}"
        raise InputError(f"{os.path.join(path, 'vocab.txt')}: {differs}. {advice}")
    if not complete and there.rules != own.rules:
        raise InputError(f"{path}: text is {there.in_words()}, that of the shards is {own.in_words()}. {advice}")


def describe_model(config: Config, model: Model, task: Task) -> Dict:
    """The model's config.json."""
    heads = task.config() if isinstance(task, ExampleTask) else {}
    return {**transformers_config(config.model, model.architecture, task.architecture), **heads}


def log_what_runs(
    config: Config, device_line: str, engine: Engine, data_set: DataSet, batch: GlobalBatch, checkpoint: Optional[str]
) -> None:
    """Says where it runs, on what, from where."""
    if engine.rank:
        return
    training, steps = config.training, engine.steps_per_call
    length = batch.arrays["input_ids"].shape[1]
    rows, samples = batch.rows // steps, batch.samples // steps
    filled = 100 * (batch.arrays["sample_ids"] > 0).mean()
    epochs = training.max_steps * samples / data_set.samples
    micro_batches = -(-rows // engine.micro_batch_size)
    logger.info("device: %s, %s", device_line, engine.describe())
    logger.info(
        f"global batch: {samples} samples in {rows} rows of {length}, {filled:.1f} % of the slots filled, "
        f"{micro_batches} micro-batches"
    )
    logger.info(f"data: {data_set.describe()}; {training.max_steps} steps are {epochs:.2f} epochs")
    if engine.made_up:
        logger.info("ipu.synthetic_data: IPUs make up their input, so no losses are reported and nothing is saved")
    if checkpoint or training.start_from:
        logger.info("%s %s", "continues from" if checkpoint else "starts from", checkpoint or training.start_from)
    if training.start_from and not checkpoint:
        logger.info("%s", adapting_line(config))


def advice_for_divergence(config: Config) -> str:
    """What to do when the loss is no number any more."""
    checkpoints = list_checkpoints(checkpoints_of(config))
    start = f", from --training.start_from {checkpoints[-1]}" if checkpoints else ""
    return (
        "Begin again with a lower optimizer.learning_rate or a longer optimizer.warmup_ratio, in another "
        f"--training.output{start}"
    )


def finish(run: Run) -> None:
    """The last evaluation in a file of its own, the picture, and where the checkpoint is."""
    config, engine = run.config, run.engine
    folder = config.training.output
    if engine.rank:
        return
    metrics, held_out = (read_metrics(os.path.join(folder, f"{name}.jsonl")) for name in ("metrics", "held_out"))
    if held_out and held_out[-1]["step"] == engine.steps_done:
        write_json(os.path.join(folder, "held_out.json"), held_out[-1])
    picture = os.path.join(folder, "curve.png")
    drawn = draw_curve(metrics, held_out, engine.task, picture, os.path.basename(folder))
    checkpoint = list_checkpoints(checkpoints_of(config))[-1]
    if run.saves:
        write_model(checkpoint, os.path.join(checkpoint, "model.safetensors"))
    mark_finished(config)
    logger.info(f"metrics{' and picture' if drawn else ''}: {folder}/metrics.jsonl{f', {picture}' if drawn else ''}")
    logger.info(f"checkpoint: AutoModel.from_pretrained({checkpoint!r})")
