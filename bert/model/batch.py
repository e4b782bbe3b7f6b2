"""What a model takes, and what flows from block to block.

Shape letters: R rows, L token slots of a row, T tokens of all samples end to end, H hidden.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, NamedTuple

import torch

from ops.attention import CuSeqlens, SampleIds, Segments

__all__ = ["NOTHING", "Batch", "State"]

NOTHING = torch.empty(0)  # before a block has made it
MODEL_FIELDS = {"input_ids", "token_type_ids", "position_ids"}


@dataclass
class Batch:
    """A micro-batch on its device, in one of two forms, which have a constructor each.

    Rows: token slots [R, L] that hold samples and padding. Unpadded: the tokens of all samples end to end, [T].
    """

    input_ids: torch.Tensor
    """[R, L] or [T]; position_ids and token_type_ids too"""
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    """Which tokens belong to one sample, and so see each other: `SampleIds` of rows, `CuSeqlens` of unpadded tokens."""
    targets: Dict[str, torch.Tensor]
    """The task's own fields: positions, labels and weights of what it predicts (data/rows.py)."""

    @staticmethod
    def of_rows(fields: Mapping[str, torch.Tensor]) -> "Batch":
        """From the fields of rows, as data/rows.py lays them out."""
        return make_batch(fields, SampleIds(fields["sample_ids"]), {"sample_ids"})

    @staticmethod
    def of_unpadded(fields: Mapping[str, Any]) -> "Batch":
        """From what `data.rows.unpad` gives."""
        segments = CuSeqlens(fields["cu_seqlens"], fields["max_seqlen"])
        return make_batch(fields, segments, {"cu_seqlens", "max_seqlen"})


def make_batch(fields: Mapping[str, Any], segments: Segments, used: set) -> Batch:
    targets = {name: tensor for name, tensor in fields.items() if name not in MODEL_FIELDS | used}
    return Batch(fields["input_ids"], fields["token_type_ids"], fields["position_ids"], segments, targets)


class State(NamedTuple):
    """What a block gets from the block before it and hands on, with what it changes replaced."""

    batch: Batch
    segments: Segments
    """The batch's, until the embeddings put them into the form that attention takes."""
    hidden: torch.Tensor = NOTHING
    """[R, L, H] or [T, H], from the embeddings on."""
    loss: torch.Tensor = NOTHING
    """The scalar that is differentiated, from the task's heads on."""
    metrics: Mapping[str, torch.Tensor] = {}
    """The task's metrics, scalars, each a weighted sum, from its heads on."""
    outputs: torch.Tensor = NOTHING
    """What a task that is scored on its own terms predicts, from its heads on (bert/tasks/task.py)."""
