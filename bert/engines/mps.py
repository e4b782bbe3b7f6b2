"""Apple's GPUs, PyTorch's device `mps`: whether a model trains there as it does on the CPU.

Wrong results of single operations, by version of macOS and torch, are what its users report most. So a tiny model
makes a step on both before a run does.
"""

from typing import Dict

import numpy as np
import torch

from bert.config import Config, ModelConfig
from bert.model.batch import Batch
from bert.model.model import initialize
from bert.optimizers import make_optimizer
from bert.tasks import make_model, make_task
from data.rows import RowShape

__all__ = ["why_not_mps"]

TOLERANCE = 1e-3  # of norms; float32 in another order differs by 1e-6
ROWS, LENGTH, MASKS, VOCAB = 8, 16, 4, 64


def why_not_mps() -> str:
    """Why a run cannot use it, in a few words; empty where it can."""
    if not torch.backends.mps.is_available():
        return "PyTorch finds no Apple GPU"
    try:
        found, expected = train_tiny("mps"), train_tiny("cpu")
    except (RuntimeError, TypeError) as error:  # an operation, or a type, that it lacks
        return f"mps fails: {str(error).splitlines()[0]}"
    for name, right in expected.items():
        # Beside the norm of all: the gradient of the keys' bias is 0 but for rounding.
        if not (found[name] - right).norm() <= TOLERANCE * (right.norm() + 0.01 * expected["gradients"].norm()):
            return f"mps computes wrongly: {name} is not what it is on the CPU"
    return ""


def train_tiny(device: str) -> Dict[str, torch.Tensor]:
    """The loss, the gradients and the new weights of one step, on the CPU."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = Config(model=ModelConfig(max_position_embeddings=LENGTH, **sizes, **no_dropout))  # type: ignore[arg-type]
    task = make_task(config)
    model = make_model(config, task)
    initialize(model, 0.1, 0)
    model.to(device).train()
    fields = tiny_batch()
    for target in task.targets:
        if target.used:
            fields[target.used] = np.flatnonzero(fields[target.weights])
    loss, _ = model(Batch.of_rows({name: torch.from_numpy(array).to(device) for name, array in fields.items()}))
    loss.backward()
    found = {"the loss": loss.detach().cpu()}
    named = dict(model.named_parameters())
    found.update({f"the gradient of {name}": p.grad.cpu() for name, p in named.items() if p.grad is not None})
    found["gradients"] = torch.cat([tensor.flatten() for name, tensor in found.items() if "gradient" in name])
    make_optimizer(named.items(), config.optimizer).step(0.01)
    found.update({f"the updated {name}": p.detach().cpu() for name, p in named.items()})
    return found


def tiny_batch() -> Dict[str, np.ndarray]:
    """Rows of samples of several lengths."""
    rng = np.random.default_rng(0)
    layout = RowShape.of(LENGTH, MASKS).layout(ROWS)
    batch: Dict[str, np.ndarray] = {name: np.zeros(size, dtype) for name, (size, dtype) in layout.items()}
    inside = np.arange(LENGTH) < np.arange(MASKS, MASKS + ROWS)[:, None]
    batch["sample_ids"][:] = inside
    batch["input_ids"][:] = inside * rng.integers(1, VOCAB, inside.shape)
    batch["token_type_ids"][:] = inside * (np.arange(LENGTH) > 2)
    batch["position_ids"][:] = inside * np.arange(LENGTH)
    batch["mlm_positions"][:] = np.arange(MASKS)
    batch["mlm_labels"][:] = rng.integers(1, VOCAB, batch["mlm_labels"].shape)
    batch["mlm_weights"][:] = 1 / batch["mlm_weights"].size
    batch["nsp_labels"][:] = np.arange(ROWS)[:, None] % 4 == 0
    batch["nsp_weights"][:] = 1 / ROWS
    return batch
