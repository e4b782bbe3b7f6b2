"""GeGLU feed-forward layers (arXiv 2002.05202) and rotary positions (arXiv 2104.09864).

python -m tests.forks.geglu_rotary --config quickstart.json
"""

import functools
import sys

import torch
from torch import nn

import run_pretraining
from bert import tasks
from bert.model.blocks import DenseGelu, Embeddings, SelfAttention
from ops.gather import embed
from ops.linear import linear


class RotaryEmbeddings(Embeddings):
    def sum(self, batch):
        words = embed(batch.input_ids, self.word_embeddings.weight)
        return words + embed(batch.token_type_ids, self.token_type_embeddings.weight)


class RotaryAttention(SelfAttention):
    def project(self, state):
        query, key, value = super().project(state)
        return self.rotate(query, state), self.rotate(key, state), value

    def rotate(self, x, state):
        """Value i of a head together with value i + D / 2, by an angle that grows with the position."""
        first, second = x.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        frequencies = 10000.0 ** (-torch.arange(first.shape[-1], device=x.device) / first.shape[-1])
        angles = state.batch.position_ids[..., None, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class DenseGeglu(DenseGelu):
    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        return super().forward(hidden) * linear(hidden, self.up.weight, self.up.bias)


def make_model(config, task):
    model = tasks.make_model(config, task, RotaryEmbeddings)
    del model.bert["embeddings"].position_embeddings
    for layer in model.layers.values():
        layer.attention["self"], layer.intermediate = RotaryAttention(config.model), DenseGeglu(config.model)
    model.architecture = {"model_type": "bert-geglu-rotary", "hidden_act": "geglu", "position_embedding_type": "rotary"}
    return model


main = functools.partial(run_pretraining.main, make_model=make_model)

if __name__ == "__main__":
    sys.exit(main())
