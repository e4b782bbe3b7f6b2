"""LAMB's two forms against a float64 transcription of the algorithm."""

import numpy as np
import pytest
import torch

from bert.config import ModelConfig
from bert.graph import BertForPretraining
from bert.stages import make_stages
from ops.lamb import Lamb, lamb_groups

SHAPES = [(64, 48), (48,), (1,), (3, 5, 7), (0,), (33, 2)]


def paper(w, g, m, v, lr, beta1, beta2, eps, decay, trust_ratio):
    """arXiv 1904.00962, algorithm 2, without bias correction, in float64."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    r = m / (np.sqrt(v) + eps)
    u = r + decay * w
    w_norm, u_norm = np.sqrt((w * w).sum()), np.sqrt((u * u).sum())
    ratio = w_norm / u_norm if trust_ratio and w_norm > 0 and u_norm > 0 else 1.0
    return w - lr * ratio * u, m, v


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-6])
@pytest.mark.parametrize("decay, trust_ratio", [(0.01, True), (0.0, False), (0.0, True)])
@pytest.mark.parametrize("zero", ["nothing", "weights", "gradients", "both"])
def test_ten_steps_equal_the_paper(foreach, eps, decay, trust_ratio, zero):
    rng = np.random.default_rng()
    weights = [np.zeros(shape) if zero in ("weights", "both") and i % 2 == 0 else rng.normal(size=shape) for i, shape in enumerate(SHAPES)]
    parameters = [torch.nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in weights]
    weights = [p.detach().double().numpy().copy() for p in parameters]
    way = [np.linalg.norm(w) for w in weights]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    optimizer = Lamb([{"params": parameters, "weight_decay": decay, "trust_ratio": trust_ratio}], lr=0.0, eps=eps, foreach=foreach)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        for i, parameter in enumerate(parameters):
            g = rng.normal(size=parameter.shape) * 10.0 ** rng.integers(-3, 2)
            g = np.float32(g * 0 if zero in ("gradients", "both") and i % 3 == 0 else g)
            parameter.grad = torch.from_numpy(g)
            before = weights[i]
            weights[i], *moments[i] = paper(weights[i], g.astype(np.float64), *moments[i], lr, 0.9, 0.999, eps, decay, trust_ratio)
            way[i] += np.linalg.norm(weights[i] - before)
        optimizer.step()
    for w, p, length in zip(weights, parameters, way):  # relative to the way a weight went: where it ends near 0, its rounding does not
        assert np.linalg.norm(p.detach().double().numpy() - w) <= 1e-6 * length


def test_groups_are_the_recipes():
    config = ModelConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    graph = BertForPretraining(config, make_stages([0, 1], 0.25))
    found = {name: (group["weight_decay"], group["trust_ratio"])
             for group in lamb_groups(graph.named_parameters(), 0.01) for name in group["names"]}
    assert set(found) == set(dict(graph.named_parameters()))
    layer = "bert.encoder.layer.0."
    for part in ("query", "key", "value"):  # three parameters, each with a trust ratio of its own
        assert found[layer + "attention.self.%s.weight" % part] == (0.01, True)
        assert found[layer + "attention.self.%s.bias" % part] == (0.0, False)
    assert found["bert.embeddings.word_embeddings.weight"] == found["cls.seq_relationship.weight"] == (0.01, True)
    assert found["bert.embeddings.LayerNorm.weight"] == found[layer + "output.LayerNorm.weight"] == (0.0, True)
    assert found["bert.embeddings.LayerNorm.bias"] == found["cls.predictions.bias"] == (0.0, False)
