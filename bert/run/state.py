"""How far a run is, and where it goes on."""

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

import torch

from bert.config import Config
from data.errors import InputError
from data.files import read_json
from data.loading.loader import GlobalBatch
from data.tokenizer import rules_in_words

__all__ = ["RunState", "read_config", "read_state"]

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """What a checkpoint holds beside weights and optimizer state (training_state.json)."""

    step: int = 0
    """The last step whose update is in the weights."""
    samples_seen: int = 0
    position: int = 0
    """In the order of samples (data/loading/order.py)."""
    skipped: Dict[str, str] = field(default_factory=dict)
    """Shards that were left out, and why."""
    skipped_updates: int = 0
    """Updates that were left out because a gradient was not finite."""
    recent: List[Mapping[str, Any]] = field(default_factory=list)
    """Metrics of the steps that are not in metrics.jsonl yet."""
    evaluated: int = 0
    """The step of the last line in held_out.jsonl."""
    best: Dict[str, Any] = field(default_factory=dict)
    """Its line of the lowest loss."""

    def advance(self, step: int, batch: GlobalBatch, metrics: Mapping[str, torch.Tensor]) -> None:
        """Notes that `step` has trained on `batch`."""
        self.step, self.samples_seen, self.position = step, self.samples_seen + batch.samples, batch.position
        self.recent.append(metrics)
        self.leave_out(batch.skipped)

    def leave_out(self, skipped: Mapping[str, str]) -> None:
        """Notes which shards are left out so far, and reports those that are new."""
        for path in [path for path in skipped if path not in self.skipped]:
            self.skipped[path] = skipped[path]
            logger.warning("left out, %d by now: %s", len(self.skipped), skipped[path])

    def take_recent(self) -> List[Mapping[str, Any]]:
        """The metrics of recent steps, which a line of the log gets."""
        recent, self.recent = self.recent, []
        return recent

    def to_json(self, data_set: Dict, skipped_updates: int, metrics: List[str]) -> Dict:
        """The contents of training_state.json, but for the run's config; `metrics` are the names of the task's."""
        recent = [{name: float(values[name]) for name in metrics} for values in self.recent]
        return {**vars(self), "recent": recent, "skipped_updates": skipped_updates, "data_set": data_set}


def read_config(checkpoint: str) -> Config:
    """The config of the run that wrote a checkpoint. Raises InputError where it says none, or one of another
    version."""
    path = os.path.join(checkpoint, "training_state.json")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; expected the checkpoint of a run, step_<number> in its checkpoints/")
    config, saved = Config(), read_json(path).get("config") or {}
    try:
        for key, value in saved.items():
            section: Any = getattr(config, key)
            setattr(config, key, dataclasses.replace(section, **value) if isinstance(value, dict) else value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its config is not one of this version ({error})")
    return config


def read_state(checkpoint: Optional[str], data_set: Dict, may_lack_shards: bool) -> RunState:
    """Where to begin. With `may_lack_shards`, a data set that lost or got shards goes on with its next epoch.

    Raises InputError where the checkpoint was trained on another data set.
    """
    if checkpoint is None:
        return RunState()
    saved = read_json(os.path.join(checkpoint, "training_state.json"))
    names = ("step", "samples_seen", "position", "skipped_updates", "recent", "evaluated", "best")
    state = RunState(**{name: saved[name] for name in names if name in saved})
    state.leave_out(saved.get("skipped", {}))
    before, now = [{tuple(shard) for shard in shards["shards"]} for shards in (saved["data_set"], data_set)]
    same_vocabulary = saved["data_set"]["vocab_sha256"] == data_set["vocab_sha256"]
    tokenizers = [saved["data_set"].get("tokenizer", data_set["tokenizer"]), data_set["tokenizer"]]  # older: unknown
    if tokenizers[0] != tokenizers[1]:
        was, given = map(rules_in_words, tokenizers)
        raise InputError(
            f"{checkpoint}: was trained on text that is {was}; that of the shards is {given}. Name the same shards "
            "with --data.files"
        )
    if same_vocabulary and before == now:
        return state
    if same_vocabulary and may_lack_shards and (before < now or now < before):
        epoch = state.position // sum(count for _, count in before)
        state.position = (epoch + 1) * sum(count for _, count in now)
        logger.warning(
            "%d of the checkpoint's %d shards are there, and %d others: continues with their next epoch, the %d.",
            len(before & now),
            len(before),
            len(now - before),
            epoch + 2,
        )
        return state
    differs = "the vocabulary differs"
    if same_vocabulary:
        sides = (("has", before - now), ("has not", now - before))
        differs = ", ".join(
            f"it {verb} {name} of {count} samples" for verb, shards in sides for name, count in sorted(shards)[:1]
        )
    raise InputError(
        f"{checkpoint}: was trained on another data set: {differs}. Name the same shards with --data.files"
    )
