"""Training on a CUDA GPU against training on the CPU."""

import numpy as np
import pytest
import torch

from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.micro_batch import full_rows
from bert.geometry import row_shape
from data.rows import packed_batch
from ops.attention import CuSeqlens, SampleMask, attention, same_sample_mask
from tests.cuda import on_cuda
from tests.make_samples import random_samples

pytestmark = on_cuda

LENGTH, MASKS, VOCAB = 64, 10, 300


def losses(device, precision, compiled, batch, steps=5):
    """MLM and NSP loss of each step of a short run without dropout, and after it."""
    config = parse_command_line(
        [
            "--device",
            device,
            "--model.vocab_size",
            str(VOCAB),
            "--model.hidden_size",
            "128",
            "--model.num_hidden_layers",
            "2",
            "--model.num_attention_heads",
            "2",
            "--model.intermediate_size",
            "256",
            "--model.max_position_embeddings",
            str(LENGTH),
            "--model.hidden_dropout_prob",
            "0",
            "--model.attention_probs_dropout_prob",
            "0",
            "--data.sequence_length",
            str(LENGTH),
            "--data.mask_tokens",
            str(MASKS),
            "--training.micro_batch_size",
            "5",
            "--training.precision",
            precision,
            "--training.compile",
            compiled,
        ]
    )
    engine = make_engine(config, device)
    found = [engine.step(batch, 0.01, step) for step in range(1, steps + 1)] + [engine.evaluate(batch)]
    engine.wait_for(steps)
    return np.array([[one[name].item() for name in ("mlm_loss", "nsp_loss")] for one in found])


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_a_short_run_on_cuda_goes_as_on_the_cpu(precision, tolerance, compiled):
    batch = packed_batch(random_samples(np.random.default_rng(0), 40, LENGTH, MASKS, VOCAB), 6)
    expected = losses("cpu", "float32", "off", batch)
    assert expected[-1, 0] < expected[0, 0] - 0.1  # it learns, or any update would do
    assert np.allclose(losses("cuda", precision, compiled, batch), expected, rtol=tolerance)


def test_the_micro_batch_that_is_found_fits_and_trains():
    config = parse_command_line(["--device", "cuda", "--config", "gpu_phase1.json", "--training.compile", "off"])
    free, _ = torch.cuda.mem_get_info()
    engine = make_engine(config, "cuda")
    assert engine.micro_batch_size >= 64 and torch.cuda.memory_allocated() < 2e9
    torch.cuda.reset_peak_memory_stats()
    batch = full_rows(2 * engine.micro_batch_size, row_shape(config, static=False), engine.task.targets)
    for step in (1, 2):
        engine.step(batch, 0.0, step)
    assert torch.cuda.max_memory_allocated() < 0.95 * free


def same_draws(attend, seed=5):
    torch.manual_seed(seed)
    return attend()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("longest", [128, 512])  # Triton's attention and flash attention
def test_attention_drops_the_same_weights_in_both_passes(longest, compiled):
    lengths, heads, size, p = [64, 31, 64, 50], 2, 64, 0.25
    spans = CuSeqlens(torch.tensor([0] + lengths).cumsum(0).int().cuda(), longest)
    attend = torch.compile(attention) if compiled else attention
    # Equal scores and values that are unit vectors: the context is the mask of the weights, divided by the length.
    units = torch.cat([torch.eye(n, size) for n in lengths]).repeat(1, heads).cuda().bfloat16()
    zeros = torch.zeros_like(units).requires_grad_()  # a gradient, or compiled code would draw as in evaluation
    context = same_draws(lambda: attend(zeros, zeros, units, spans, heads, p)).unflatten(-1, (heads, size)).float()
    mask = (context > 0).float() / (1 - p)
    inputs = [torch.randn(sum(lengths), heads * size, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    found, parts, start = same_draws(lambda: attend(*inputs, spans, heads, p)), [], 0
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    for n in lengths:
        q, k, v = (tensor[start : start + n].unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in exact)
        weights = torch.softmax(q @ k.transpose(1, 2) / 8, dim=-1) * mask[start : start + n, :, :n].transpose(0, 1)
        parts.append((weights @ v).transpose(0, 1).flatten(1))
        start += n
    expected, direction = torch.cat(parts), torch.randn_like(found)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, direction)),
        (expected, *torch.autograd.grad(expected, exact, direction.float())),
    )
    for fast, slow in pairs:
        assert (fast.float() - slow).norm() < 0.02 * slow.norm()


@pytest.mark.parametrize("longest", [128, 512])
def test_attention_over_tokens_laid_end_to_end_agrees_with_the_mask(longest):
    lengths, heads = [100, 28, 128, 1, 60, 0, 67], 4
    starts = torch.tensor([0] + lengths).cumsum(0).int().cuda()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    mask = SampleMask(same_sample_mask(ids[None]))
    inputs = [
        torch.randn(sum(lengths), heads * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    direction = torch.randn_like(inputs[0])
    flat = attention(*inputs, CuSeqlens(starts, longest), heads, 0.0)
    rows = attention(*[tensor[None].float() for tensor in inputs], mask, heads, 0.0)[0]
    fast, slow = torch.autograd.grad(flat, inputs, direction), torch.autograd.grad(rows, inputs, direction.float())
    for found, expected in zip((flat, *fast), (rows, *slow)):
        assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()
