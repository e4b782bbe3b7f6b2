"""The model: an ordered list of named blocks, each a module from `State` to `State`.

Forward iterates over the list. So do PopTorch's annotations (ops/ipu.py), the planner, and whoever shares or replaces
blocks; a stage of a pipeline is a run of it (bert/model/stages.py).
"""

import contextlib
from typing import Any, Dict, List, Sequence, Tuple, Type

import torch
from torch import nn

from bert.config import ModelConfig
from bert.model.batch import Batch, State
from bert.model.blocks import Embeddings, EncoderLayer
from ops.float8 import float8
from ops.ipu import block as ipu_block

__all__ = ["Model", "initialize"]


class Model(nn.Module):
    """BERT's embeddings and encoder layers, to which a task adds its heads (bert/tasks).

    `blocks` is what runs: ("embeddings", module), ("layer0", module), ..., and then the heads. Modules stand under
    `bert` and `cls` for the names of their parameters only.
    """

    architecture = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    """What transformers' config.json says of a model that computes as this one does."""

    def __init__(self, config: ModelConfig, embeddings: Type[nn.Module] = Embeddings):
        super().__init__()
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.bert = nn.ModuleDict({"embeddings": embeddings(config), "encoder": nn.ModuleDict({"layer": layers})})
        self.blocks: List[Tuple[str, nn.Module]] = [("embeddings", self.bert["embeddings"])]
        self.blocks += [(f"layer{i}", module) for i, module in enumerate(layers)]
        self.float8 = False
        """Whether the linear layers of the encoder are float8 (ops/float8.py); heads, where rounding shows, never."""

    @property
    def layers(self) -> Dict[str, nn.Module]:
        """The encoder's layers among the blocks, by name."""
        return {name: module for name, module in self.blocks if name.startswith("layer")}

    def forward(self, batch: Batch, predicts: bool = False) -> Any:
        """The loss and the metrics of the task. Summed over the micro-batches of a global batch, they are its means:
        the batch's weights see to that. With `predicts` the outputs of the task's heads instead."""
        state = self.whole(batch)
        return state.outputs if predicts else (state.loss, state.metrics)

    def whole(self, batch: Batch) -> State:
        """What the last block hands on."""
        return self.run(State(batch, batch.segments), self.blocks)

    def encode(self, batch: Batch) -> torch.Tensor:
        """The hidden state after the last layer, [R, L, H] or [T, H]."""
        names = [name for name, _ in self.blocks]
        return self.run(State(batch, batch.segments), self.blocks[: 1 + names.index(list(self.layers)[-1])]).hidden

    def run(self, state: State, blocks: Sequence[Tuple[str, nn.Module]]) -> State:
        """Runs a part of the blocks, one after the other."""
        layers = self.layers if self.float8 else {}
        for name, module in blocks:
            with ipu_block(name), float8() if name in layers else contextlib.nullcontext():
                state = module(state)
        return state


def initialize(model: nn.Module, std: float, seed: int) -> None:
    """The recipe's initial weights: matrices normal(0, std) cut off at 2 std, biases 0, LayerNorm weights 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "LayerNorm" in name:
                parameter.fill_(1.0)
            else:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
