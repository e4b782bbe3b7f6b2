"""The task's metrics over all held-out samples."""

from typing import Any, Dict

from tqdm import tqdm

from bert.config import Config
from bert.engines import Engine
from data.loading.loader import batches_in_order
from data.loading.shard_files import open_shards
from data.rows import Part

__all__ = ["evaluate"]


def evaluate(config: Config, engine: Engine, part: Part) -> Dict[str, Any]:
    """Means over the samples of data.held_out_files, without dropout: what held_out.json holds."""
    data, task = config.data, engine.task
    shards = open_shards(data.held_out_files, data.sequence_length, data.mask_tokens, config.model.vocab_size)
    sums, counts, samples = dict.fromkeys(task.metrics, 0.0), dict.fromkeys(task.metrics.values(), 0), 0
    total, quiet = sum(shard.num_samples for shard in shards), True if engine.rank else None
    with tqdm(total=total, unit="seq", desc="evaluating", disable=quiet, leave=False) as bar:
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
