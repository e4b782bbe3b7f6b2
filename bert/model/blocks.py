"""BERT's blocks, in the order in which data flows: embeddings, encoder layers. Each goes from `State` to `State`.

Parameter names are those of transformers' BertModel, so that `state_dict()` is a checkpoint.

Shape letters: R rows, L token slots of a row, H hidden. Where tokens are unpadded (bert/model/batch.py), R L is one
number of tokens T.
"""

from torch import nn

from bert.config import ModelConfig
from bert.model.batch import Batch, State
from ops.attention import attention, for_layers
from ops.dropout import dropout
from ops.gather import embed
from ops.ipu import no_outline, recompute_from
from ops.linear import linear_dropout_add_norm, linear_gelu, linears
from ops.norm import LayerNorm

__all__ = ["DenseAddNorm", "DenseGelu", "Embeddings", "EncoderLayer", "SelfAttention"]


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalised: ids [R, L] -> hidden [R, L, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, state: State) -> State:
        embedded = self.sum(state.batch)
        with no_outline("embeddings"):
            normal = self.LayerNorm(embedded)
        hidden = dropout(normal, self.dropout if self.training else 0.0)
        return state._replace(hidden=hidden, segments=for_layers(state.batch.segments, hidden.dtype))

    def sum(self, batch: Batch):
        """The embeddings' sum, [R, L, H]."""
        words = embed(batch.input_ids, self.word_embeddings.weight)
        types = embed(batch.token_type_ids, self.token_type_embeddings.weight)
        return words + types + embed(batch.position_ids, self.position_embeddings.weight)


class SelfAttention(nn.Module):
    """Multi-head attention within samples: [R, L, H] -> [R, L, H]. Q, K and V are one product of three parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, state: State):
        query, key, value = self.project(state)
        return attention(query, key, value, state.segments, self.heads, self.dropout if self.training else 0.0)

    def project(self, state: State):
        """Q, K and V, each [R, L, H]."""
        layers = self.query, self.key, self.value
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return linears(state.hidden, weights, biases, "query_key_value")


class DenseAddNorm(nn.Module):
    """Linear, dropout, residual, LayerNorm: the end of attention and of the feed-forward layer."""

    def __init__(self, size: int, config: ModelConfig, name: str):
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout, self.name = config.hidden_dropout_prob, name

    def forward(self, hidden, residual):
        dense, norm, p = self.dense, self.LayerNorm, self.dropout if self.training else 0.0
        return linear_dropout_add_norm(
            hidden, dense.weight, dense.bias, residual, norm.weight, norm.bias, norm.eps, p, self.name
        )


class DenseGelu(nn.Module):
    """Linear and GELU (the exact one): the beginning of the feed-forward layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        return linear_gelu(hidden, self.dense.weight, self.dense.bias, "intermediate")


class EncoderLayer(nn.Module):
    """Attention, then the feed-forward layer, post-norm as in the paper (arXiv 1810.04805): [R, L, H] -> [R, L, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        output = DenseAddNorm(config.hidden_size, config, "attention_output")
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": output})
        self.intermediate: nn.Module = DenseGelu(config)
        self.output = DenseAddNorm(config.intermediate_size, config, "output")

    def forward(self, state: State) -> State:
        hidden = self.attention["output"](self.attention["self"](state), state.hidden)
        return state._replace(hidden=recompute_from(self.output(self.intermediate(hidden), hidden)))
