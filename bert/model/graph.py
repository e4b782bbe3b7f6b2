"""The BERT graph, in the order in which data flows: embeddings, encoder layers, heads, losses.

Parameter names are those of transformers' BertForPreTraining, so that `state_dict()` is a checkpoint.

Shape letters: R rows, L token slots of a row, M mask slots of a row, S samples of a row, H hidden, V vocabulary. A
batch may also be tokens laid end to end (data/rows.py): then R L is one number of tokens T, R M one of masked tokens, R
S one of samples.
"""

import contextlib
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from bert.config import ModelConfig
from ops.attention import CuSeqlens, SampleIds, Segments, attention, for_layers
from ops.dropout import dropout
from ops.float8 import float8
from ops.gather import embed, gather_tokens
from ops.ipu import block, mark_loss, no_outline, recompute_from
from ops.linear import linear_dropout_add_norm, linear_gelu, linears
from ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["Bert", "BertForPretraining", "initialize"]


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalised: three [R, L] of ids -> [R, L, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, input_ids, token_type_ids, position_ids):
        embedded = (
            embed(input_ids, self.word_embeddings.weight)
            + embed(token_type_ids, self.token_type_embeddings.weight)
            + embed(position_ids, self.position_embeddings.weight)
        )
        with no_outline("embeddings"):
            normal = self.LayerNorm(embedded)
        return dropout(normal, self.dropout if self.training else 0.0)


class SelfAttention(nn.Module):
    """Multi-head attention within samples: [R, L, H] -> [R, L, H]. Q, K and V are one product of three parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, segments: Segments):
        layers = self.query, self.key, self.value
        query, key, value = linears(
            hidden, [layer.weight for layer in layers], [layer.bias for layer in layers], "query_key_value"
        )
        return attention(query, key, value, segments, self.heads, self.dropout if self.training else 0.0)


class DenseAddNorm(nn.Module):
    """Linear, dropout, residual, LayerNorm: the end of attention and of the feed-forward layer."""

    def __init__(self, size: int, config: ModelConfig, name: str):
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout, self.name = config.hidden_dropout_prob, name

    def forward(self, hidden, residual):
        return linear_dropout_add_norm(
            hidden,
            self.dense.weight,
            self.dense.bias,
            residual,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            self.dropout if self.training else 0.0,
            self.name,
        )


class DenseGelu(nn.Module):
    """Linear and GELU (the exact one): the beginning of the feed-forward layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        return linear_gelu(hidden, self.dense.weight, self.dense.bias, "intermediate")


class EncoderLayer(nn.Module):
    """[R, L, H] -> [R, L, H], post-norm as in the paper (arXiv 1810.04805). `segments` says which tokens are one
    sample's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        output = DenseAddNorm(config.hidden_size, config, "attention_output")
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": output})
        self.intermediate = DenseGelu(config)
        self.output = DenseAddNorm(config.intermediate_size, config, "output")

    def forward(self, hidden, segments: Segments):
        hidden = self.attention["output"](self.attention["self"](hidden, segments), hidden)
        return self.output(self.intermediate(hidden), hidden)


class Bert(nn.Module):
    """Embeddings and encoder, without heads: a batch of rows -> hidden [R, L, H]."""

    def __init__(self, config: ModelConfig, float8: bool = False):
        super().__init__()
        self.float8 = float8
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))}
        )

    def forward(self, input_ids, token_type_ids, position_ids, segments: Segments):
        with block("embeddings"):
            hidden = self.embeddings(input_ids, token_type_ids, position_ids)
            segments = for_layers(segments, hidden.dtype)
        with float8() if self.float8 else contextlib.nullcontext():
            for i, layer in enumerate(self.encoder["layer"]):
                with block(f"layer{i}"):
                    hidden = recompute_from(layer(hidden, segments))
        return hidden


class Pooler(nn.Module):
    """The [CLS] token of each sample through a linear layer and tanh: [R, S, H] -> [R, S, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, cls_hidden):
        return torch.tanh(self.dense(cls_hidden))


class Transform(nn.Module):
    """Linear, GELU, LayerNorm before the MLM decoder: [T, H] -> [T, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden):
        return self.LayerNorm(linear_gelu(hidden, self.dense.weight, self.dense.bias, "mlm_transform"))


class Predictions(nn.Module):
    """The MLM head without its decoder, which is the word embedding's weight; `bias` is the decoder's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class BertForPretraining(nn.Module):
    """The graph that an engine trains: a batch of rows (data/rows.py) -> the weighted loss and its parts.

    `serialization_factor` is the number of parts that the MLM decoder and its loss are computed in; None leaves it to
    ops/linear_cross_entropy.py. `float8` is for the linear layers of the encoder (ops/float8.py): the heads, where rounding shows
    in the loss, keep their type.
    """

    def __init__(
        self,
        config: ModelConfig,
        serialization_factor: Optional[int] = None,
        float8: bool = False,
    ):
        super().__init__()
        self.serialization_factor = serialization_factor
        self.bert = Bert(config, float8)
        self.bert.pooler = Pooler(config)
        self.cls = nn.ModuleDict(
            {"predictions": Predictions(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        )

    def forward(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Returns the loss (MLM + NSP, weighted sums) and, as scalars, mlm_loss, nsp_loss, mlm_accuracy and
        nsp_accuracy.

        Summed over the micro-batches of a global batch these are its means: the weights see to that. A batch is rows,
        or tokens laid end to end. `mlm_used`, in a batch of rows, says which of the R * M mask slots hold a masked
        token: no others are computed.
        """
        segments: Segments = (
            CuSeqlens(batch["cu_seqlens"], batch["max_seqlen"])
            if "cu_seqlens" in batch
            else SampleIds(batch["sample_ids"])
        )
        hidden = self.bert(batch["input_ids"], batch["token_type_ids"], batch["position_ids"], segments)
        with block("heads"):
            mlm_hidden, labels, weights = (
                gather_tokens(hidden, batch["mlm_positions"]),
                batch["mlm_labels"],
                batch["mlm_weights"],
            )
            mlm_hidden, labels, weights = mlm_hidden.flatten(0, -2), labels.flatten(), weights.flatten()
            if "mlm_used" in batch:
                mlm_hidden, labels, weights = [
                    tensor.index_select(0, batch["mlm_used"]) for tensor in (mlm_hidden, labels, weights)
                ]
            mlm, mlm_correct = linear_cross_entropy(
                self.cls["predictions"].transform(mlm_hidden),
                self.bert.embeddings.word_embeddings.weight,
                self.cls["predictions"].bias,
                labels,
                weights,
                self.serialization_factor,
            )
            nsp_logits = self.nsp_logits(hidden, batch["cls_positions"]).float().flatten(0, -2)
            nsp_labels, nsp_weights = batch["nsp_labels"].flatten(), batch["nsp_weights"].flatten()
            nsp = (nsp_weights * F.cross_entropy(nsp_logits, nsp_labels.long(), reduction="none")).sum()
            nsp_correct = (nsp_weights * (nsp_logits.argmax(dim=-1) == nsp_labels).float()).sum()
            loss = mark_loss(mlm + nsp) if self.training else mlm + nsp
            return loss, {
                "mlm_loss": mlm.detach(),
                "nsp_loss": nsp.detach(),
                "mlm_accuracy": mlm_correct.detach(),
                "nsp_accuracy": nsp_correct.detach(),
            }

    def mlm_logits(self, hidden, mlm_positions):
        """hidden [R, L, H] at mlm_positions [R, M] -> logits [R * M, V]; training never holds them, see
        ops/linear_cross_entropy.py."""
        transformed = self.cls["predictions"].transform(gather_tokens(hidden, mlm_positions).flatten(0, -2))
        return F.linear(transformed, self.bert.embeddings.word_embeddings.weight, self.cls["predictions"].bias)

    def nsp_logits(self, hidden, cls_positions):
        """hidden [R, L, H] at cls_positions [R, S] -> [R, S, 2]; class 1: the second segment does not follow the
        first."""
        return self.cls["seq_relationship"](self.bert.pooler(gather_tokens(hidden, cls_positions)))


def initialize(graph: nn.Module, std: float, seed: int) -> None:
    """The recipe's initial weights: matrices normal(0, std) cut off at 2 std, biases 0, LayerNorm weights 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in graph.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "LayerNorm" in name:
                parameter.fill_(1.0)
            else:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
