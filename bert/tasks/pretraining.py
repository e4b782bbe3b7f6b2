"""BERT's own task: masked language modelling (MLM), and next sentence prediction (NSP) or MLM alone.

Parameter names are those of transformers' BertForPreTraining, or of BertForMaskedLM.

Shape letters: R rows, L token slots of a row, M mask slots of a row, S samples of a row, H hidden, V vocabulary. Where
tokens are unpadded (bert/model/batch.py), R L is one number of tokens T, R M one of masked tokens, R S one of samples.
"""

import math
from typing import Optional, Sequence, Tuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from bert.config import Config, DataConfig, ModelConfig
from bert.model.batch import State
from bert.model.model import Model
from bert.tasks.heads import Pooler
from bert.tasks.task import Panel
from data.errors import InputError
from data.rows import MLM, NSP, RowShape, Target
from data.shards import ShardInfo
from ops.gather import gather_tokens
from ops.ipu import mark_loss
from ops.linear import linear_gelu
from ops.linear_cross_entropy import linear_cross_entropy
from ops.norm import LayerNorm

__all__ = ["Pretraining", "PretrainingHeads"]


class Pretraining:
    """MLM and, with `nsp`, NSP."""

    def __init__(self, nsp: bool = True):
        self.nsp = nsp
        self.targets: Sequence[Target] = [MLM, NSP][: 1 + nsp]
        self.panels: Sequence[Panel] = [
            Panel("mlm", "MLM loss", "mlm_loss", "mlm_accuracy"),
            Panel("nsp", "NSP loss", "nsp_loss", "nsp_accuracy", chance=math.log(2)),
        ][: 1 + nsp]
        self.metrics = {panel.loss: target.weights for panel, target in zip(self.panels, self.targets)}
        self.metrics.update({panel.accuracy: target.weights for panel, target in zip(self.panels, self.targets)})
        self.architecture = "BertForPreTraining" if nsp else "BertForMaskedLM"
        self.selected_by = "loss"

    def add_heads(self, model: Model, config: Config) -> None:
        """The heads, and the pooler under transformers' name for it."""
        words = cast(nn.Embedding, model.get_submodule("bert.embeddings.word_embeddings"))
        if self.nsp:
            model.bert["pooler"] = Pooler(config.model)
        model.cls = PretrainingHeads(
            config.model, words, model.bert["pooler"] if self.nsp else None, config.ipu.embedding_serialization_factor
        )
        model.blocks.append(("heads", model.cls))

    def row_shape(self, data: DataConfig, samples_per_row: int) -> RowShape:
        return RowShape.of(data.sequence_length, data.mask_tokens, samples_per_row)

    def check_shards(self, shards: Sequence[ShardInfo]) -> None:
        """Raises InputError for samples of one segment, which hold nothing for NSP."""
        for shard in shards:
            if self.nsp and shard.segments < 2:
                raise InputError(
                    f"{shard.path}: its samples have one segment, and task.nsp is true, which needs two. Set task.nsp "
                    "to false, or prepare the text again without --nsp false"
                )


class Transform(nn.Module):
    """Linear, GELU, LayerNorm before the MLM decoder: [T, H] -> [T, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden):
        return self.LayerNorm(linear_gelu(hidden, self.dense.weight, self.dense.bias, "mlm_transform"))


class Predictions(nn.Module):
    """The MLM head without its decoder, which is the word embedding's weight; `bias` is the decoder's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class PretrainingHeads(nn.Module):
    """The last block: losses and accuracies of MLM and, where there is a pooler, of NSP.

    `parts` is the number of parts that the MLM decoder and its loss are computed in; None leaves it to
    ops/linear_cross_entropy.py.
    """

    def __init__(self, config: ModelConfig, words: nn.Embedding, pooler: Optional[nn.Module], parts: Optional[int]):
        super().__init__()
        self.parts = parts
        self.shared = (words, pooler)  # a tuple, for they stand under other names in the model
        self.predictions = Predictions(config)
        if pooler is not None:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, state: State) -> State:
        """Where a batch of rows has `mlm_used`, it says which of the R M mask slots hold a masked token: no others are
        computed."""
        hidden, fields = state.hidden, state.batch.targets
        loss, mlm_correct = self.mlm(hidden, fields)
        metrics = {"mlm_loss": loss, "mlm_accuracy": mlm_correct}
        if self.shared[1] is not None:
            nsp, nsp_correct = self.nsp(hidden, fields)
            metrics = {"mlm_loss": loss, "nsp_loss": nsp, "mlm_accuracy": mlm_correct, "nsp_accuracy": nsp_correct}
            loss = loss + nsp
        return state._replace(
            loss=mark_loss(loss) if self.training else loss,
            metrics={name: value.detach() for name, value in metrics.items()},
        )

    def mlm(self, hidden, fields) -> Tuple[torch.Tensor, torch.Tensor]:
        """The weighted sums of the cross-entropy and of right predictions."""
        masked = gather_tokens(hidden, fields["mlm_positions"]).flatten(0, -2)
        labels, weights = fields["mlm_labels"].flatten(), fields["mlm_weights"].flatten()
        if "mlm_used" in fields:
            masked, labels, weights = [x.index_select(0, fields["mlm_used"]) for x in (masked, labels, weights)]
        predictions, decoder = self.predictions, self.shared[0].weight
        return linear_cross_entropy(
            predictions.transform(masked), decoder, predictions.bias, labels, weights, self.parts
        )

    def nsp(self, hidden, fields) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same of NSP."""
        logits = self.nsp_logits(hidden, fields["cls_positions"]).float().flatten(0, -2)
        labels, weights = fields["nsp_labels"].flatten(), fields["nsp_weights"].flatten()
        loss = (weights * F.cross_entropy(logits, labels.long(), reduction="none")).sum()
        return loss, (weights * (logits.argmax(dim=-1) == labels).float()).sum()

    def mlm_logits(self, hidden, mlm_positions):
        """hidden [R, L, H] at mlm_positions [R, M] -> logits [R * M, V]; training never holds them."""
        masked = self.predictions.transform(gather_tokens(hidden, mlm_positions).flatten(0, -2))
        return F.linear(masked, self.shared[0].weight, self.predictions.bias)

    def nsp_logits(self, hidden, cls_positions):
        """hidden [R, L, H] at cls_positions [R, S] -> [R, S, 2]; class 1: the second segment does not follow the
        first."""
        return self.seq_relationship(self.shared[1](gather_tokens(hidden, cls_positions)))
