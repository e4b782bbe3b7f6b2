"""GeGLU feed-forward layers (arXiv 2002.05202) and rotary positions (arXiv 2104.09864).

python -m tests.forks.geglu_rotary --config quickstart.json
"""

import functools
import sys

import torch
from torch import nn

import run_pretraining
from bert import tasks
from bert.model.blocks import Embeddings, EncoderLayer, SelfAttention
from ops.gather import embed
from ops.linear import linear, linear_gelu


class RotaryEmbeddings(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        del self.position_embeddings

    def sum(self, batch):
        words = embed(batch.input_ids, self.word_embeddings.weight)
        return words + embed(batch.token_type_ids, self.token_type_embeddings.weight)


class RotaryAttention(SelfAttention):
    def project(self, state):
        query, key, value = super().project(state)
        size = query.shape[-1] // self.heads // 2
        frequencies = 10000.0 ** (-torch.arange(size, device=query.device) / size)
        angles = (state.batch.position_ids[..., None] * frequencies)[..., None, :]  # one head's, for all heads
        return *(rotate(x.unflatten(-1, (self.heads, -1)), angles).flatten(-2) for x in (query, key)), value


def rotate(x, angles):
    """x [..., A, D] by angles [..., 1, D / 2]: value i together with value i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class DenseGeglu(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        return linear_gelu(hidden, self.gate.weight, self.gate.bias) * linear(
            hidden, self.dense.weight, self.dense.bias
        )


class Layer(EncoderLayer):
    def __init__(self, config):
        super().__init__(config)
        self.attention["self"], self.intermediate = RotaryAttention(config), DenseGeglu(config)


def make_model(config, task):
    model = tasks.make_model(config, task, RotaryEmbeddings, Layer)
    model.architecture = {"model_type": "bert-geglu-rotary", "hidden_act": "geglu", "position_embedding_type": "rotary"}
    return model


main = functools.partial(run_pretraining.main, make_model=make_model)

if __name__ == "__main__":
    sys.exit(main())
