"""What the heads of several tasks are made of.

Shape letters: R rows, L token slots of a row, P prediction slots of a row, C choices, n labels, H hidden. Where tokens
are unpadded (bert/model/batch.py), R L is one number of tokens T, R P one of predictions K.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from bert.config import Config, ModelConfig
from bert.model.batch import State
from bert.model.model import Model
from ops.dropout import dropout
from ops.gather import gather_tokens
from ops.ipu import mark_loss

__all__ = ["LabelHead", "Pooler", "add_label_head", "with_loss"]


class Pooler(nn.Module):
    """The [CLS] token of each sample through a linear layer and tanh: [R, S, H] -> [R, S, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, cls_hidden):
        return torch.tanh(self.dense(cls_hidden))


class LabelHead(nn.Module):
    """The last block of tasks that give a label to the token at each position, or choose one of C tokens: dropout and a
    linear layer, after the pooler where there is one, and the loss.

    The loss is the cross-entropy of the labels; of a single output of one token, the squared error.
    """

    def __init__(self, pooler: Optional[nn.Module], classifier: nn.Linear, p: float):
        super().__init__()
        self.dropout, self.shared = p, (pooler, classifier)  # a tuple, for they stand under other names in the model

    def forward(self, state: State) -> State:
        fields = state.batch.targets
        logits = self.logits(state.hidden, fields["positions"])
        labels, weights = fields["labels"].flatten(), fields["weights"].flatten()
        if logits.shape[1] == 1:
            errors = logits[:, 0] - labels
            return with_loss(state, {"label_loss": (weights * errors * errors).sum()}, logits, self.training)
        loss = (weights * F.cross_entropy(logits, labels.long(), reduction="none")).sum()
        right = (weights * (logits.argmax(dim=-1) == labels).float()).sum()
        return with_loss(state, {"label_loss": loss, "label_accuracy": right}, logits, self.training)

    def logits(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """hidden [R, L, H] at positions [R, P] -> [R P, n], at positions [R, P, C] -> [R P, C]; float32."""
        pooler, classifier = self.shared
        size = positions.shape[-1] if positions.dim() > hidden.dim() - 1 else classifier.out_features
        tokens = gather_tokens(hidden, positions.flatten(hidden.dim() - 2)).flatten(0, -2)
        pooled = tokens if pooler is None else pooler(tokens)
        return classifier(dropout(pooled, self.dropout if self.training else 0.0)).float().reshape(-1, size)


def with_loss(state: State, metrics, outputs: torch.Tensor, training: bool) -> State:
    """The state with what a head found; the first of its metrics is the loss."""
    loss = next(iter(metrics.values()))
    return state._replace(
        loss=mark_loss(loss) if training else loss,
        metrics={name: value.detach() for name, value in metrics.items()},
        outputs=outputs.detach(),
    )


def add_label_head(model: Model, config: Config, outputs: int, pools: bool) -> None:
    """Appends a LabelHead of so many outputs to the model, under transformers' names for its parameters."""
    pooler = Pooler(config.model) if pools else None
    if pooler is not None:
        model.bert["pooler"] = pooler
    model.classifier = nn.Linear(config.model.hidden_size, outputs)
    model.head = LabelHead(pooler, model.classifier, config.model.hidden_dropout_prob)  # so that eval() reaches it
    model.blocks.append(("heads", model.head))
