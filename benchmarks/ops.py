"""The operations of ops/, forward and backward, beside plain PyTorch's, over the shapes of both phases.

    python benchmarks/ops.py --json ops.json --plot ops.png

All ways of an operation get the same random tensors and take turns. Gradients of parameters are added to those that are
there, as between the micro-batches of a step: in float32, whatever the type of the tensors. FLOP/s count useful work
only (attention within samples) and are held against the fastest matrix product of any library.

On the CPU a second table has the products of a linear layer by themselves, each as the libraries have it: its output
and the gradients of its input and its weight.

Shape letters: R rows, L tokens of a row, T tokens in all (R * L: no row has padding), I input and O output features, H
hidden, A heads, D head size, V vocabulary.
"""

import functools
import os
import sys
from typing import Callable, Dict, List, NamedTuple

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.plot import draw_bars
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.synthetic import draw_lengths
from benchmarks.timing import device_name, gemm_rate, timed
from bert.engines.torch_devices import Cpu, Cuda, choose_precision
from bert.text import count_of
from ops import native
from ops.attention import CuSeqlens, SampleMask, attention, attention_plain, has_varlen_kernel, same_sample_mask
from ops.linear import (
    linear_dropout_add_norm,
    linear_dropout_add_norm_plain,
    linear_gelu,
    linear_gelu_plain,
    linears,
    linears_plain,
)
from ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_plain

HIDDEN, HEADS, VOCAB, DROPOUT = 768, 12, 30522, 0.1
# Rows and their length: a micro-batch that is good for the device.
SHAPES = {"cpu": {"phase 1": (8, 128), "phase 2": (2, 512)}, "cuda": {"phase 1": (512, 128), "phase 2": (128, 512)}}
GEMM_SHAPE = {"cpu": (1024, 768, 3072), "cuda": (65536, 768, 3072)}


class Case(NamedTuple):
    """An operation at one shape."""

    ways: Dict[str, Callable[[], torch.Tensor]]
    """the forward pass, among them "plain" """
    activations: List[torch.Tensor]
    """inputs whose gradients are not added up"""
    flops: float
    """of both passes"""


def attention_case(rows, length, random, _):
    query, key, value = [random(rows * length, HIDDEN) for _ in range(3)]
    samples = sample_ids(rows, length)
    mask = same_sample_mask(torch.from_numpy(samples)).to(query.device)
    _, lengths = np.unique(samples + 1000 * np.arange(rows)[:, None], return_counts=True)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(query.device)

    def plain():
        in_heads = [tensor.view(rows, length, HEADS, -1).transpose(1, 2) for tensor in (query, key, value)]
        return attention_plain(*in_heads, mask, DROPOUT).transpose(1, 2).flatten(2).flatten(0, 1)

    def in_rows():
        in_rows = [tensor.view(rows, length, -1) for tensor in (query, key, value)]
        return attention(*in_rows, SampleMask(mask), HEADS, DROPOUT).flatten(0, 1)

    ways = {"plain": plain, "rows with a mask": in_rows}
    if has_varlen_kernel(query.device.type, query.dtype, HIDDEN // HEADS):
        cu_seqlens = CuSeqlens(starts, int(lengths.max()))
        ways["unpadded"] = lambda: attention(query, key, value, cu_seqlens, HEADS, DROPOUT)
    return Case(ways, [query, key, value], flops=12 * HIDDEN * np.square(lengths, dtype=np.float64).sum())


def linears_case(rows, length, random, parameter):
    x = random(rows * length, HIDDEN)
    arguments = x, [parameter(HIDDEN, HIDDEN) for _ in range(3)], [parameter(HIDDEN) for _ in range(3)]
    return Case(
        {"plain": lambda: linears_plain(*arguments), "this project's": lambda: linears(*arguments)},
        [x],
        flops=6 * rows * length * 3 * HIDDEN * HIDDEN,
    )


def linear_gelu_case(rows, length, random, parameter):
    arguments = x, _, _ = random(rows * length, HIDDEN), parameter(4 * HIDDEN, HIDDEN), parameter(4 * HIDDEN)
    return Case(
        {"plain": lambda: linear_gelu_plain(*arguments), "this project's": lambda: linear_gelu(*arguments)},
        [x],
        flops=6 * rows * length * 4 * HIDDEN * HIDDEN,
    )


def linear_norm_case(rows, length, random, parameter):
    x, residual = random(rows * length, 4 * HIDDEN), random(rows * length, HIDDEN)
    weight, bias, norm_weight, norm_bias = parameter(HIDDEN, 4 * HIDDEN), *(parameter(HIDDEN) for _ in range(3))
    arguments = x, weight, bias, residual, norm_weight, norm_bias, 1e-3, DROPOUT
    return Case(
        {
            "plain": lambda: linear_dropout_add_norm_plain(*arguments),
            "this project's": lambda: linear_dropout_add_norm(*arguments),
        },
        [x, residual],
        flops=6 * rows * length * 4 * HIDDEN * HIDDEN,
    )


def decoder_loss_case(rows, length, random, parameter):
    slots = int(0.15 * rows * length)
    hidden, decoder, bias = random(slots, HIDDEN), parameter(VOCAB, HIDDEN), parameter(VOCAB)
    labels, weights = torch.randint(VOCAB, (slots,)).to(hidden.device), torch.rand(slots, device=hidden.device) / slots
    ways = {"plain": lambda: linear_cross_entropy_plain(hidden, decoder, bias, labels, weights)[0]}
    for way, factor in (("this project's", None), ("in 1 part", 1), ("in 4 parts", 4)):
        ways[way] = lambda factor=factor: linear_cross_entropy(hidden, decoder, bias, labels, weights, factor)[0]
    return Case(ways, [hidden], flops=6 * slots * HIDDEN * VOCAB)


CASES = {
    "attention": attention_case,
    "query, key, value": linears_case,
    "linear, GELU": linear_gelu_case,
    "linear, dropout, add, norm": linear_norm_case,
    "MLM loss": decoder_loss_case,
}


def sample_ids(rows, length):
    """[R, L] of rows without padding, with samples of Wikipedia's lengths; the last sample of a row is cut off."""
    rng = np.random.default_rng(0)
    ends = np.cumsum([draw_lengths("wikipedia", length, length, rng) for _ in range(rows)], axis=1, dtype=np.int64)
    return np.stack([1 + np.searchsorted(row, np.arange(length), side="right") for row in ends])


def forward_backward(case, way, directions):
    for tensor in case.activations:
        tensor.grad = None
    torch.autograd.backward(as_tuple(case.ways[way]()), directions)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def measure(case, device, rounds):
    """Way -> seconds of both passes, the median over rounds; they take turns."""
    directions = tuple(torch.randn_like(output) for output in as_tuple(case.ways["plain"]()))
    passes = {way: functools.partial(forward_backward, case, way, directions) for way in case.ways}
    seconds, repeat = {way: [] for way in passes}, {}
    for way, work in passes.items():
        work()
        repeat[way] = max(1, int(0.05 / timed(device, work)))
    for _ in range(rounds):
        for way, work in passes.items():
            seconds[way].append(timed(device, work, repeat[way]))
    return {way: median(values) for way, values in seconds.items()}


USES = 8  # micro-batches of a step, for which weights are packed once


def product_ways(features, outputs, dtype):
    """{product: {way: (work, products in it)}} of 1,024 tokens on the CPU."""
    tokens = GEMM_SHAPE["cpu"][0]
    x, gradient = torch.randn(tokens, features).to(dtype), torch.randn(tokens, outputs).to(dtype)
    weight = with_master((0.02 * torch.randn(outputs, features)).to(dtype).requires_grad_())
    total = native.grad_of(weight)

    def add_product():
        total.add_(gradient.t() @ x) if dtype == torch.bfloat16 else total.addmm_(gradient.t(), x)

    def for_a_step(product):
        with native.packed_weights(USES):
            for _ in range(USES):
                product()

    products = {
        "output": (lambda: x @ weight.t(), lambda: native.linear(x, weight)),
        "input's gradient": (lambda: gradient @ weight, lambda: native.linear_input_grad(gradient, weight)),
        "weight's gradient": (add_product, lambda: native.accumulate_weight_grad(weight, gradient, x)),
    }
    return {
        name: {
            "torch.mm": (plain, 1),
            "this project's": (own, 1),
            f"this project's, {USES} times": (functools.partial(for_a_step, own), USES),
        }
        for name, (plain, own) in products.items()
    }


def with_master(parameter):
    """A parameter whose gradient is summed in float32, as the engine makes them on the CPU."""
    if parameter.dtype != torch.float32:
        parameter.master = parameter.detach().float().requires_grad_()
    return parameter


@torch.no_grad()
def run_products(dtype, gemm, rounds):
    tokens, products, table = GEMM_SHAPE["cpu"][0], [], []
    for features, outputs in ((HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)):
        flops = 2 * tokens * features * outputs
        for name, ways in product_ways(features, outputs, dtype).items():
            seconds = {way: [] for way in ways}
            for _ in range(rounds):
                for way, (work, count) in ways.items():
                    work()
                    repeat = max(1, int(0.05 / timed("cpu", work)))
                    seconds[way].append(timed("cpu", work, repeat) / count)
            shares = {way: flops / median(times) / gemm for way, times in seconds.items()}
            product = {"product": name, "tokens": tokens, "inputs": features, "outputs": outputs}
            products.append({**product, "share_of_gemm_rate": shares})
            table.append([f"{name}, {features} to {outputs}", *(f"{100 * share:.0f} %" for share in shares.values())])
    print(
        f"\nproducts of {tokens} tokens, share of that rate; once, and {USES} times with weights that stay as they are"
    )
    print_table(["", *ways], table)
    return products


def run(arguments):
    device = arguments.device
    precision = choose_precision(Cuda() if device == "cuda" else Cpu(), arguments.precision)
    dtype = getattr(torch, precision)

    def random(*shape, std=1.0):
        return torch.randn(*shape, device=device, dtype=dtype).mul_(std).requires_grad_()

    def parameter(*shape):
        tensor = random(*shape, std=0.02)
        return with_master(tensor) if device == "cpu" else tensor

    cases, rates, table, faster = [], [], [], {}
    for name, make in CASES.items():
        for phase, (rows, length) in SHAPES[device].items():
            case = make(rows, length, random, parameter)
            rates.append(gemm_rate(device, GEMM_SHAPE[device], dtype))
            seconds = measure(case, device, arguments.rounds)
            ways = {way: {"seconds": s, "flops_per_second": case.flops / s} for way, s in seconds.items()}
            cases.append({"operation": name, "phase": phase, "rows": rows, "length": length, "ways": ways})
    gemm = median(rates)
    for case in cases:
        operation, plain = case["operation"], case["ways"]["plain"]["seconds"]
        for way, figures in case["ways"].items():
            figures["share_of_gemm_rate"] = share = figures["flops_per_second"] / gemm
            figures["times_as_fast"] = times = plain / figures["seconds"]
            name = f"{operation}, {case['rows']} x {case['length']}, {way}"
            teraflops, milliseconds = figures["flops_per_second"] / 1e12, 1e3 * figures["seconds"]
            table.append([name, f"{milliseconds:.3f}", f"{times:.2f}", f"{teraflops:.3g}", f"{100 * share:.0f} %"])
            faster.setdefault(f"{operation}, {case['phase']}", {})[way] = times
    rows, common, columns = GEMM_SHAPE[device]
    print(f"matrix product: {gemm / 1e12:.4g} TFLOP/s, {rows} x {common} by {common} x {columns}, {dtype}")
    print(f"medians of {count_of(arguments.rounds, 'round')}")
    header = ["forward and backward", "ms", "faster than plain by", "TFLOP/s", "of the matrix product's rate"]
    print_table(header, table)
    if arguments.plot:
        draw_bars(arguments.plot, "times as fast as plain PyTorch, forward and backward", faster)
    results = {"gemm_flops_per_second": gemm, "dtype": str(dtype), "cases": cases}
    if device == "cpu":
        results["products"] = run_products(dtype, gemm, arguments.rounds)
    write_json(arguments.json, results, torch=torch.__version__, device=device_name(device))


def main():
    parser = make_parser(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="(default here: %(default)s)")
    precisions = ["auto", "float32", "bfloat16"]
    parser.add_argument("--precision", choices=precisions, default="auto", help="as in training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in which the ways take turns (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them here")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
