"""What a run is called, what is in its shards, and in a step."""

import glob
import os
from dataclasses import dataclass
from typing import Dict, List, Optional

from bert.config import Config
from bert.geometry import row_shape
from bert.text import percent
from data.loading.shard_files import open_shards
from data.packing import pack
from data.rows import RowShape
from data.shards import read_samples

__all__ = ["DataFacts", "epochs_of", "look_at_data", "optimizer_name", "run_name", "samples_of_step", "step_lines"]

SAMPLES_READ = 32768  # of the shards, to see how they pack
OPTIMIZER_NAMES = {"lamb": "LAMB", "adamw": "AdamW", "muon": "Muon"}


def run_name(config: Config) -> str:
    return os.path.basename(os.path.normpath(config.training.output or "run"))


def optimizer_name(config: Config) -> str:
    return OPTIMIZER_NAMES.get(config.optimizer.name, config.optimizer.name)


@dataclass(frozen=True)
class DataFacts:
    """What the shards say, as far as they are there."""

    samples: Optional[int] = None
    filled: Optional[float] = None
    """Tokens of a sample, as a share of the sequence length, on average."""
    per_row: Optional[float] = None
    """Samples of a packed row, on average."""
    missing: str = ""
    """Why there is nothing to say, if there are no shards."""


def look_at_data(config: Config) -> DataFacts:
    """Opens the shards if there are any. Raises InputError if they do not fit the config."""
    data = config.data
    if not any(glob.glob(pattern) for pattern in data.files):
        where = ", ".join(data.files) or "data.files, which is empty"
        remedy = ", training makes them from data.text" if data.text else ""
        return DataFacts(missing=f"no shards at {where}{remedy}")
    skipped: Optional[Dict[str, str]] = {} if data.on_bad_shard == "skip" else None
    shards = open_shards(data.files, data.sequence_length, data.mask_tokens, config.model.vocab_size, skipped)
    samples = sum(shard.num_samples for shard in shards)
    own = [shard for shard in shards if shard.offsets and shard.num_samples]
    if not own:  # NVIDIA's files do not say how long samples are before all of them is read
        return DataFacts(samples)
    first = read_samples(own[0].path, 0, min(SAMPLES_READ, own[0].num_samples))
    shape = RowShape.of(data.sequence_length, data.mask_tokens, data.samples_per_row)
    rows = pack(first.lengths, first.mlm_counts, *shape).rows
    return DataFacts(samples, float(first.lengths.mean()) / data.sequence_length, len(first) / rows)


def samples_of_step(config: Config, facts: DataFacts) -> Optional[int]:
    """On IPUs; None if samples share rows and nothing says how many do."""
    rows = config.training.global_batch_size
    if row_shape(config, static=True).samples == 1:
        return rows
    return int(rows * facts.per_row) if facts.per_row else None


def step_lines(config: Config, facts: DataFacts) -> List[str]:
    """A step on IPUs."""
    data, ipu, rows = config.data, config.ipu, config.training.global_batch_size
    samples, slots = samples_of_step(config, facts), rows * data.sequence_length
    micro_batches = f"{ipu.gradient_accumulation_steps:,} micro-batches of {ipu.micro_batch_size} rows"
    all_rows = f"{rows:,} rows of {data.sequence_length} tokens"
    lines = ["A step", f"  {micro_batches} on each replica: {all_rows}, {slots:,} token slots"]
    if row_shape(config, static=True).samples == 1:
        lines.append(f'  {samples:,} samples, one a row (data.packing is "{data.packing}")')
    elif samples:
        per_row = f"{facts.per_row:.2f} a row, as the first of data.files pack"
        lines.append(f"  about {samples:,} samples, {per_row}; up to {data.samples_per_row} share a row")
    else:
        lines.append(f"  up to {data.samples_per_row} samples share a row; how many do depends on their lengths")
    if samples and facts.filled:
        tokens = samples * facts.filled * data.sequence_length
        lines.append(f"  about {tokens:,.0f} tokens, which fill {percent(tokens / slots)} of the slots")
    if facts.missing:
        counts = "tokens" if samples else "tokens and samples"
        then = f"the plan says how many {counts} a step has, and how many epochs the run is"
        lines.append(f"  {facts.missing}: with shards there, {then}")
    return lines


def epochs_of(samples: int, facts: DataFacts) -> str:
    return f", {samples / facts.samples:,.2f} epochs" if facts.samples else ""
