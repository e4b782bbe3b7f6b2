"""Whether operations are right on a GPU: the tests that need one, then attention and dropout in the shapes of training.

Shape letters: R rows, L token slots of a row, T tokens, A heads, D head size, O output features.
"""

import glob
import importlib.util
import math
import os
import re
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_items import ROOT, Bench, Figures, Item, Skip, TooLong, Wrong
from benchmarks.synthetic import random_samples
from data.rows import packed_batch, unpad
from ops.attention import CuSeqlens, attention, attention_plain, has_varlen_kernel, same_sample_mask
from ops.linear import linear_dropout_add_norm

__all__ = ["error_of", "kernel_tests", "operation_checks", "require"]

DROPOUT = 0.1


def operation_checks() -> List[Item]:
    """The tests of kernels first."""
    paths = sorted(glob.glob(os.path.join(ROOT, "tests", "**", "test_*.py"), recursive=True))
    tests = [
        Item(os.path.relpath(path, ROOT), 15, lambda bench, figures, path=path: kernel_tests(path, bench, figures))
        for path in paths
        if has_cuda_tests(path)
    ]
    return [
        *tests,
        Item("attention", 20, attention_within_spans),
        Item("dropout", 20, dropout),
    ]


def has_cuda_tests(path: str) -> bool:
    with open(path, encoding="utf-8") as file:
        return "import on_cuda" in file.read()


class Outcomes:
    """What pytest reports of the tests of one file."""

    def __init__(self) -> None:
        self.passed, self.failed, self.skipped, self.broken = 0, [], [], ""
        self.interrupt: Any = None

    def pytest_runtest_logreport(self, report) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")
        self.note_skip(report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.broken = str(report.longrepr)
        self.note_skip(report)

    def note_skip(self, report) -> None:
        if report.skipped:
            self.skipped.append(report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr))

    def pytest_keyboard_interrupt(self, excinfo) -> None:
        if type(excinfo.value) in (KeyboardInterrupt, TooLong):  # others are pytest's own
            self.interrupt = excinfo.value


def kernel_tests(path: str, bench: Bench, figures: Figures) -> str:
    """The tests of a file that need a GPU, in this process."""
    bench.needs_cuda("tests marked cuda")
    bench.release()
    import pytest

    outcomes = Outcomes()
    # pytest's own faulthandler would call off the one that ends an item which hangs.
    options = ["-m", "cuda", "-q", "--capture=sys", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    pytest.main([*options, path], plugins=[outcomes])
    if outcomes.interrupt is not None:
        raise outcomes.interrupt
    missing = re.search(r"No module named '(\w+)", outcomes.broken)
    if missing and importlib.util.find_spec(missing.group(1)) is None:
        raise Skip(f"{missing.group(1)} is not installed")
    figures.update(passed=outcomes.passed, failed=outcomes.failed, skipped=outcomes.skipped)
    if outcomes.broken or outcomes.failed:
        raise Wrong("; ".join([*outcomes.broken.splitlines()[-1:], *outcomes.failed]))
    if not outcomes.passed:
        raise Skip(f"no test ran: {', '.join(sorted(set(outcomes.skipped))) or 'none is marked cuda'}")
    return f"{outcomes.passed} passed, {len(outcomes.skipped)} skipped"


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected norm."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def require(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise Wrong(f"{name} is {value:.3g}, expected at most {most:.3g}")


def attention_within_spans(bench: Bench, figures: Figures) -> str:
    """Attention over tokens laid end to end, against float32 with a mask: empty spans at the end, padding that holds
    what must not reach a sample."""
    bench.release()
    dtype = half_or_float(bench.device)
    if not has_varlen_kernel(bench.device, dtype, 64):
        raise Skip("no kernel for tokens laid end to end here")
    ways: Dict[str, Callable] = {"eager": attention}
    if bench.device == "cuda":
        ways["compiled"] = torch.compile(attention, dynamic=False)
    shapes = [(4, 32), (2, 64)] if bench.tiny else [(64, 128), (16, 512)]
    for rows, length in shapes:
        for poison in (1e4, math.nan):
            for way, attend in ways.items():
                name = f"{rows} x {length}, padding of {poison:g}, {way}"
                figures[name] = attention_errors(bench.device, dtype, rows, length, poison, attend)
    most = 0.02 if dtype == torch.bfloat16 else 1e-5
    for name, errors in figures.items():
        for tensor, (error, worst_token) in errors.items():
            require(f"{tensor}'s relative error ({name})", error, most)
            require(f"{tensor}'s error of the worst token ({name})", worst_token, 10 * most)
    return f"worst relative error {max(pair[0] for errors in figures.values() for pair in errors.values()):.2g}"


def attention_errors(
    device: str, dtype: torch.dtype, rows: int, length: int, poison: float, attend: Callable
) -> Dict[str, Tuple[float, float]]:
    """Of context and gradients: the relative error, and the largest of a token's, relative to the tokens' mean norm."""
    heads, size = 4, 64
    samples = random_samples(length // 3, 3 * rows, length, 1, 100, np.random.default_rng(torch.initial_seed()))
    batch = packed_batch(samples, 8)
    fields, ids = unpad(batch, static=True), torch.from_numpy(batch["sample_ids"]).to(device)
    empty = np.full(7, ids.numel(), np.int32)
    starts = torch.from_numpy(np.append(fields["cu_seqlens"], empty)).to(device)
    if device == "cuda":
        torch._dynamo.mark_dynamic(starts, 0)  # as the engine does
    real, mask = ids.flatten() > 0, same_sample_mask(ids)
    if not len(samples.lengths) < int((starts.diff() > 0).sum()) < len(starts) - 1:
        raise Wrong("the batch of this check has no padding or no empty spans")
    exact = [torch.randn(ids.numel(), heads * size, device=device).to(dtype) for _ in range(3)]
    poisoned = [torch.where(real[:, None], x, torch.full_like(x, poison)).requires_grad_() for x in exact]
    direction = torch.randn_like(exact[0]) * real[:, None]
    context = attend(*poisoned, CuSeqlens(starts, length), heads, 0.0)
    found = (context, *torch.autograd.grad(context, poisoned, direction))

    clean = [(x * real[:, None]).float().requires_grad_() for x in exact]
    in_heads = [x.view(len(ids), length, heads, size).transpose(1, 2) for x in clean]
    plain = attention_plain(*in_heads, mask, 0.0).transpose(1, 2).reshape(-1, heads * size)
    expected = (plain, *torch.autograd.grad(plain, clean, direction.float()))
    errors = {}
    for name, fast, slow in zip(("context", "dQ", "dK", "dV"), found, expected):
        fast, slow = fast[real].float(), slow[real]
        worst = (fast - slow).norm(dim=1).max() / slow.norm(dim=1).mean()
        errors[name] = error_of(fast, slow), worst.item()
    return errors


def dropout(bench: Bench, figures: Figures) -> str:
    """How often dropout drops, that a seed repeats it and another does not, and that both passes drop the same."""
    bench.release()
    ways: Dict[str, Tuple[Callable, Callable]] = {"eager": (linear_dropout_add_norm, attention)}
    if bench.device == "cuda":
        compiled = [torch.compile(function, dynamic=False) for function in ways["eager"]]
        ways["compiled"] = compiled[0], compiled[1]
    for way, (linear, attend) in ways.items():
        figures[way] = {
            "linear_dropout_add_norm": dropout_of_linear(bench, linear),
            "attention": dropout_of_attention(bench, attend),
        }
    rates = [figures[way][operation]["rate"] for way in ways for operation in figures[way]]
    return f"rates of {', '.join(f'{rate:.4f}' for rate in rates)} for {DROPOUT}"


def dropout_of_linear(bench: Bench, linear: Callable) -> Dict[str, float]:
    size, dtype = (256, 256) if bench.tiny else (8192, 768), half_or_float(bench.device)

    def run(seed: int, x, weight, bias, residual, norm_weight, norm_bias):
        inputs = x, weight, bias, residual, norm_weight, norm_bias
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
        torch.manual_seed(seed)
        return linear(*leaves, 1e-3, DROPOUT), leaves

    def random(*shape):
        return torch.randn(*shape, device=bench.device).to(dtype).float()

    # All elements alike before dropout: those that it keeps are above the mean.
    zeros, ones = torch.zeros(size, device=bench.device), torch.ones(size[1], device=bench.device)
    masks = [run(seed, zeros, random(size[1], size[1]), ones, zeros, ones, 0 * ones)[0] > 0 for seed in (5, 5, 6)]
    figures = check_masks("linear_dropout_add_norm", masks, slack=1e-4)
    inputs = (
        random(*size),
        random(size[1], size[1]) / 16,
        random(size[1]),
        random(*size),
        random(size[1]),
        random(size[1]),
    )
    output, leaves = run(5, *inputs)
    direction = random(*size)
    output.backward(direction.to(dtype))  # on the CPU gradients of parameters are added in place

    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    x, weight, bias, residual, norm_weight, norm_bias = exact
    total = F.linear(x, weight, bias) * masks[0] / (1 - DROPOUT) + residual
    expected = F.layer_norm(total, (size[1],), norm_weight, norm_bias, 1e-3)
    expected.backward(direction)
    errors = [error_of(output, expected), *(error_of(fast.grad, slow.grad) for fast, slow in zip(leaves, exact))]
    figures["worst_error_with_the_same_mask"] = max(errors)
    require("the error with the mask that was drawn", max(errors), 0.02 if dtype == torch.bfloat16 else 1e-4)
    return figures


def dropout_of_attention(bench: Bench, attend: Callable) -> Dict[str, float]:
    count, heads, length, dtype = 4 if bench.tiny else 128, 4, 64, half_or_float(bench.device)
    if not has_varlen_kernel(bench.device, dtype, length):
        raise Skip("no kernel for tokens laid end to end here")
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=bench.device)
    # Equal scores, and values that are unit vectors: what is not 0 in the context is what was kept.
    units = torch.eye(length, device=bench.device, dtype=dtype).repeat(count, heads)
    zeros = torch.zeros_like(units).requires_grad_()  # without a gradient, compiled code would draw as in evaluation

    def mask(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attend(zeros, zeros, units, CuSeqlens(starts, length), heads, DROPOUT) > 0

    # Flash attention compares bytes: its rate is a multiple of 1/256.
    return check_masks("attention", [mask(seed) for seed in (5, 5, 6)], slack=1 / 256)


def check_masks(name: str, masks: List[torch.Tensor], slack: float) -> Dict[str, float]:
    """Two of one seed and one of another, each [T, O], True where an element was kept."""
    first, same, other = masks
    if not torch.equal(first, same):
        raise Wrong(f"{name}: one seed gives two masks")
    rate, sigma = 1 - first.double().mean().item(), math.sqrt(DROPOUT * (1 - DROPOUT) / first.numel())
    require(f"{name}: the rate's distance from {DROPOUT}", abs(rate - DROPOUT), slack + 5 * sigma)
    for what, mean in (("column", first.double().mean(dim=0)), ("row", first.double().mean(dim=1))):
        spread = math.sqrt(DROPOUT * (1 - DROPOUT) / (first.numel() / mean.numel()))
        require(f"{name}: the rate of a {what}", (1 - mean - rate).abs().max().item(), 7 * spread)
    independent = rate**2 + (1 - rate) ** 2
    pairs = {
        "another seed": (first, other),
        "the next row": (first[1:], first[:-1]),
        "the next": (first[:, 1:], first[:, :-1]),
    }
    for what, (one, two) in pairs.items():
        agree = (one == two).double().mean().item()
        require(f"{name}: the likeness of a mask to that of {what}", abs(agree - independent), 10 * sigma)
    return {"rate": rate, "standard_deviation": sigma}


def half_or_float(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32
