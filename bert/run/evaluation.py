"""The task's metrics over all held-out samples, and when a run evaluates them."""

import math
from typing import Any, Dict

from tqdm import tqdm

from bert.config import Config
from bert.engines import Engine
from bert.run.console import bar_width
from bert.run.curve import read_metrics
from bert.run.state import RunState
from data.loading.loader import batches_in_order
from data.loading.shard_files import open_shards
from data.rows import Part

__all__ = ["evaluate", "is_due", "is_out_of_patience", "note_evaluation", "recall_evaluations"]


def evaluate(config: Config, engine: Engine, part: Part) -> Dict[str, Any]:
    """Means over the samples of data.held_out_files, without dropout: what held_out.json holds."""
    data, task = config.data, engine.task
    shards = open_shards(data.held_out_files, data.sequence_length, data.mask_tokens, config.model.vocab_size)
    sums, counts, samples = dict.fromkeys(task.metrics, 0.0), dict.fromkeys(task.metrics.values(), 0), 0
    total, quiet = sum(shard.num_samples for shard in shards), True if engine.rank else None
    with tqdm(total=total, unit="seq", desc="evaluating", disable=quiet, leave=False, ncols=bar_width()) as bar:
        for batch in batches_in_order(shards, 256 * part.size, part):
            metrics = engine.evaluate(batch.arrays)
            for name, weights in task.metrics.items():
                sums[name] += float(metrics[name]) * batch.counts[weights]
            for weights in counts:
                counts[weights] += batch.counts[weights]
            samples += batch.samples
            bar.update(batch.samples)
    means = {name: sums[name] / max(1, counts[weights]) for name, weights in task.metrics.items()}
    loss = sum(means[panel.loss] for panel in task.panels)
    return {"step": engine.steps_done, "samples": samples, "loss": loss, **means}


def is_due(config: Config, step: int, state: RunState) -> bool:
    """Whether the weights of this step are to be evaluated, and are not yet."""
    training = config.training
    asked = step == training.max_steps or (training.evaluate_every and step % training.evaluate_every == 0)
    return bool(config.data.held_out_files and asked and state.evaluated < step)


def note_evaluation(state: RunState, held_out: Dict[str, Any], selected_by: str) -> bool:
    """Notes what an evaluation gave; whether it is the best so far, by what the task says."""
    is_best = not state.best or worth(held_out, selected_by) > worth(state.best, selected_by)
    state.evaluated, state.best = held_out["step"], held_out if is_best else state.best
    return is_best


def worth(held_out: Dict[str, Any], selected_by: str) -> float:
    """More is better."""
    value = held_out.get(selected_by, math.nan)
    return -math.inf if math.isnan(value) else -value if selected_by.endswith("loss") else value


def recall_evaluations(state: RunState, path: str, selected_by: str) -> None:
    """Notes those in a held_out.jsonl that were made after the checkpoint of their step was saved, which lacks them."""
    for line in read_metrics(path):
        if state.evaluated < line["step"] <= state.step:
            note_evaluation(state, line, selected_by)


def is_out_of_patience(config: Config, state: RunState) -> bool:
    """Whether training.patience is at its end."""
    training = config.training
    if not training.patience or not training.evaluate_every or not state.best:
        return False
    return state.evaluated - state.best["step"] >= training.patience * training.evaluate_every
