"""Training on a CUDA GPU against training on the CPU."""

import numpy as np
import pytest

from bert.config import parse_command_line
from bert.training import make_engine
from data.packing import mask_slots_of_row, pack
from data.rows import batch_layout, fill_packed, weigh
from tests.make_samples import random_samples

pytestmark = pytest.mark.cuda

LENGTH, MASKS, VOCAB = 64, 10, 300


def packed_batch(samples, per_row=6):
    slots = mask_slots_of_row(MASKS, per_row)
    packing = pack(samples.lengths, samples.mlm_counts, LENGTH, slots, per_row)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in batch_layout(packing.rows, LENGTH, slots, per_row).items()}
    order = np.lexsort((packing.place, packing.row))
    fill_packed(batch, samples.take(order), *(field[order] for field in packing[1:]))
    weigh(batch)
    return batch


def losses(device, precision, compiled, batch, steps=5):
    """MLM and NSP loss of each step of a short run without dropout, and after it."""
    config = parse_command_line([
        "--device", device, "--model.vocab_size", str(VOCAB), "--model.hidden_size", "128", "--model.num_hidden_layers", "2",
        "--model.num_attention_heads", "2", "--model.intermediate_size", "256", "--model.max_position_embeddings", str(LENGTH),
        "--model.hidden_dropout_prob", "0", "--model.attention_probs_dropout_prob", "0", "--data.sequence_length", str(LENGTH),
        "--data.mask_tokens", str(MASKS), "--training.micro_batch_size", "5", "--training.precision", precision,
        "--training.compile", compiled, "--ipu.layers_per_ipu", "[0, 2]"])
    engine = make_engine(config, device)
    found = [engine.step(batch, 0.01, step) for step in range(1, steps + 1)] + [engine.evaluate(batch)]
    return np.array([[one[name].item() for name in ("mlm_loss", "nsp_loss")] for one in found])


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_a_short_run_on_cuda_goes_as_on_the_cpu(precision, tolerance, compiled):
    batch = packed_batch(random_samples(np.random.default_rng(0), 40, LENGTH, MASKS, VOCAB))
    expected = losses("cpu", "float32", "off", batch)
    assert expected[-1, 0] < expected[0, 0] - 0.1  # it learns, or any update would do
    assert np.allclose(losses("cuda", precision, compiled, batch), expected, rtol=tolerance)
