"""How fast training is on a GPU: the products and copies that it consists of, sequences/s, and each kernel's time.

Shape letters: T tokens, I input features, O output features of a linear layer.
"""

import json
import os
import re
import tempfile
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch

from benchmarks.gpu_items import Bench, Figures, Item, Skip, Wrong
from benchmarks.pretraining import GEMM_SHAPES, PARTS, Ours, Transformers, useful_flops
from benchmarks.report import median
from benchmarks.synthetic import random_samples, write_data_set
from benchmarks.timing import gemm_rate, timed
from bert.run.loop import train
from data.errors import InputError

__all__ = ["PHASES", "own_speed", "peer_speed", "whole_run"]

LARGE = "--model.num_hidden_layers 24 --model.hidden_size 1024 --model.num_attention_heads 16"
LARGE += " --model.intermediate_size 4096"
TINY_LARGE = "--model.hidden_size 64 --model.num_attention_heads 4 --model.intermediate_size 128"
# Name -> config, options, samples of a step: as much as makes some micro-batches.
PHASES: Dict[str, Tuple[str, str, int]] = {
    "phase1": ("gpu_phase1.json", "", 4096),
    "phase2": ("gpu_phase2.json", "", 2048),
    "phase1-float8": ("gpu_phase1.json", "--training.precision float8", 4096),
    "phase1-large": ("gpu_phase1.json", LARGE, 2048),
}
# What a kernel does, by its name: the first pattern that is found in it. Those of compiled code begin with `triton_`.
KINDS = {
    "attention": r"flash|fmha|attention|attend",
    "float8": r"quantize",
    "matrix products": r"^triton_tem|gemm|nvjet|cutlass|xmma|cublas|split_?k|addmm|scaled_mm|::mm$",
    "compiled: norm": r"^triton_.*norm",
    "compiled: GELU": r"^triton_.*(gelu|erf)",
    "compiled: others": r"^triton_",
    "MLM loss": r"cross_?entropy|softmax",
    "dropout, add, norm": r"norm",
    "GELU": r"gelu",
    "embeddings, gather": r"embedding|index|segment|grad_weight|scatter|gather",
    "copies": r"memcpy|memset|copy|cat|fill|zero|empty",
    "elementwise, sums": r"elementwise|vectorized|reduce|multi_tensor|::(add|mul|sum)_?$",
}
ROUNDS = 3


def own_speed() -> List[Item]:
    """A phase and its profile share their engine."""
    items = [Item("products", 25, products)]
    for phase, seconds in (("phase1", 40), ("phase2", 35), ("phase1-float8", 40), ("phase1-large", 45)):
        items.append(Item(phase, seconds, lambda bench, figures, phase=phase: own_rate(phase, bench, figures)))
        items.append(Item(f"{phase}-profile", 10, lambda bench, figures, phase=phase: profile(phase, bench, figures)))
    return items


def peer_speed() -> List[Item]:
    return [
        Item(f"{phase}-peer", 60, lambda bench, figures, phase=phase: peer_rate(phase, bench, figures))
        for phase in ("phase1", "phase2")
    ]


def products(bench: Bench, figures: Figures) -> str:
    """Each of the encoder's products, in bfloat16 and float8, and the rate of a copy."""
    bench.release()
    tokens, hidden = (256, 64) if bench.tiny else (131072, 768)
    layers = {
        "query, key, value": (hidden, 3 * hidden),
        "attention output": (hidden, hidden),
        "intermediate": (hidden, 4 * hidden),
        "output": (4 * hidden, hidden),
    }
    figures["copy_bytes_per_second"] = copy_rate(bench)
    figures["tokens"], figures["products"] = tokens, []
    for layer, (inputs, outputs) in layers.items():
        # Rows, common size and columns of each product.
        directions = {
            "forward": (tokens, inputs, outputs),
            "input gradient": (tokens, outputs, inputs),
            "weight gradient": (outputs, tokens, inputs),
        }
        for direction, shape in directions.items():
            row: Dict[str, Any] = {"layer": layer, "direction": direction, "shape": shape}
            for precision, make in (("bfloat16", bfloat16_product), ("float8", float8_product)):
                if precision == "bfloat16" or has_float8(bench):
                    seconds = mean_seconds(bench, make(bench.device, direction, *shape))
                    row[precision] = {"seconds": seconds, "flops_per_second": 2 * float(np.prod(shape)) / seconds}
            figures["products"].append(row)
            rates = [
                f"{name} {row[name]['flops_per_second'] / 1e12:.4g}" for name in ("bfloat16", "float8") if name in row
            ]
            print(f"  {layer}, {direction}, {shape}: {', '.join(rates)} TFLOP/s", flush=True)
    work = sum(2 * float(np.prod(row["shape"])) for row in figures["products"])
    figures["mean_flops_per_second"] = work / sum(row["bfloat16"]["seconds"] for row in figures["products"])
    copies = f"copies {figures['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    return f"{figures['mean_flops_per_second'] / 1e12:.4g} TFLOP/s in bfloat16 on average, {copies}"


def copy_rate(bench: Bench) -> float:
    """Bytes/s read and written."""
    source = torch.randn(2**16 if bench.tiny else 2**28, device=bench.device)
    target = torch.empty_like(source)
    return 8 * source.numel() / mean_seconds(bench, lambda: target.copy_(source))


def mean_seconds(bench: Bench, work: Callable) -> float:
    """Of one call, the least of five tries, each of a tenth of a second."""
    timed(bench.device, work)
    once = timed(bench.device, work)
    return min(timed(bench.device, work, max(1, int((0.01 if bench.tiny else 0.1) / once))) for _ in range(5))


def has_float8(bench: Bench) -> bool:
    return bench.device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def bfloat16_product(device: str, direction: str, rows: int, common: int, columns: int) -> Callable:
    """With operands that lie as the layer's do: the weight is [O, I], the gradient [T, O], the input [T, I]."""
    options: Dict[str, Any] = dict(device=device, dtype=torch.bfloat16)
    a = (
        torch.randn(common, rows, **options).t()
        if direction == "weight gradient"
        else torch.randn(rows, common, **options)
    )
    b = (
        torch.randn(columns, common, **options).t()
        if direction == "forward"
        else torch.randn(common, columns, **options)
    )
    out = torch.empty(rows, columns, **options)
    return lambda: torch.mm(a, b, out=out)


def float8_product(device: str, direction: str, rows: int, common: int, columns: int) -> Callable:
    """With operands that lie as tensor cores take them, whatever it costs to bring them there."""
    kind = torch.float8_e4m3fn if direction == "forward" else torch.float8_e5m2
    a, b = torch.randn(rows, common, device=device).to(kind), torch.randn(columns, common, device=device)
    b, one = b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
    options = dict(out_dtype=torch.bfloat16, use_fast_accum=direction == "forward")
    return lambda: torch._scaled_mm(a, b, one, one, **options)


def measured(bench: Bench, phase: str):
    """The config and the samples of a step."""
    name, options, count = PHASES[phase]
    if bench.tiny:
        options, count = TINY_LARGE if options == LARGE else options, 40
    config = bench.config(name, *options.split())
    sizes = config.data.sequence_length, config.data.mask_tokens, config.model.vocab_size
    return config, random_samples("wikipedia", count, *sizes, np.random.default_rng(0))


def held_training(bench: Bench, phase: str) -> Ours:
    def make() -> Ours:
        config, samples = measured(bench, phase)
        try:
            return Ours(bench.device, config, samples)
        except InputError as error:  # no float8 on this card
            raise Skip(str(error))

    return bench.hold(f"training, {phase}", make)


def own_rate(phase: str, bench: Bench, figures: Figures) -> str:
    way = held_training(bench, phase)
    shapes = [(64, 64, 64)] if bench.tiny else GEMM_SHAPES[bench.device]
    figures["gemm_flops_per_second"] = max(gemm_rate(bench.device, shape, torch.bfloat16) for shape in shapes)
    line = rate(phase, way, bench, figures)
    if bench.device == "cuda" and not way.engine.compiled:
        raise Wrong(f"layers are not compiled: {line}")
    return line


def rate(phase: str, way, bench: Bench, figures: Figures) -> str:
    """Sequences/s of whole steps; the optimizer's time counts as in a step of the config's global batch."""
    config, samples = measured(bench, phase)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the search for a micro-batch
    for _ in range(2):  # the first compiles
        way.step()
    rounds = 1 if bench.tiny else ROUNDS
    figures["rounds"] = [timed(bench.device, way.step) for _ in range(rounds)]
    parts = [way.measure() for _ in range(rounds)]
    figures["parts"] = {part: median([seconds[part] for seconds in parts]) for part in PARTS}
    update, count = figures["parts"]["optimizer"], len(samples)
    seconds = (median(figures["rounds"]) - update) / count + update / config.training.global_batch_size
    mean_length = float(samples.lengths.mean())
    figures.update(
        settings=way.describe(),
        samples=count,
        mean_length=mean_length,
        sequences_per_second=1 / seconds,
        tokens_per_second=mean_length / seconds,
        useful_flops_per_second=useful_flops(config.model, samples) / count / seconds,
    )
    if bench.device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    rates = f"{figures['sequences_per_second']:.5g} sequences/s of {mean_length:.0f} tokens"
    return f"{rates}, {figures['useful_flops_per_second'] / 1e12:.4g} useful TFLOP/s; {figures['settings']}"


def peer_rate(phase: str, bench: Bench, figures: Figures) -> str:
    """transformers with torch.compile and bfloat16 autocast, on the same samples, padded."""
    config, samples = measured(bench, phase)
    compiled = bench.device == "cuda"
    bench.release()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # PyTorch's default, as its users have it
    tried = Transformers(bench.device, config, samples, False).choose()
    figures["micro_batches_tried"] = {f"{rows} rows": seconds for (rows, _), seconds in tried.items()}
    best = min(tried, key=lambda way: tried[way])
    bench.release()
    way = Transformers(bench.device, config, samples, compiled, *best)
    return rate(phase, way, bench, figures)


def profile(phase: str, bench: Bench, figures: Figures) -> str:
    """Each kernel's time in one micro-batch, forward and backward, as a table of text too."""
    way = held_training(bench, phase)
    engine = way.engine
    _, micro_batch = next(engine.micro_batches(way.batch))

    def work() -> None:
        engine.backward(engine.forward(micro_batch, {}))

    engine.model.train()
    for _ in range(2):
        work()
    seconds = timed(bench.device, work, 1 if bench.tiny else 5)
    rows = kernel_times(bench.device, work)
    engine.clear_gradients()
    busy = sum(row["seconds"] for row in rows)
    kinds: Dict[str, float] = {}
    for row in rows:
        row["share"] = row["seconds"] / busy
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["seconds"]
    kinds = dict(sorted(kinds.items(), key=lambda pair: -pair[1]))
    tokens = micro_batch.input_ids.numel()
    figures.update(seconds=seconds, busy_seconds=busy, tokens=tokens, kinds=kinds, kernels=rows)
    write_table(os.path.join(bench.folder, f"{phase}-profile.txt"), rows, kinds, seconds)
    parts = ", ".join(f"{kind} {1e3 * value:.1f}" for kind, value in kinds.items())
    return f"{1e3 * seconds:.1f} ms for {tokens:,} tokens; kernels {1e3 * busy:.1f}: {parts}"


def kernel_times(device: str, work: Callable) -> List[Dict[str, Any]]:
    """One row a kernel, by its time; on the CPU one an operation. Raises Wrong where the profiler saw none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_cuda = device == "cuda"
    with torch_profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        timed(device, work)
    rows = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) == on_cuda and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            kind = next(
                (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE)), "others"
            )
            rows.append({"kernel": event.key, "kind": kind, "calls": event.count, "seconds": microseconds / 1e6})
    if not sum(row["seconds"] for row in rows) > 0:
        raise Wrong("the profiler saw no kernel: it needs CUPTI, and may need the right to read performance counters")
    return sorted(rows, key=lambda row: -row["seconds"])


def write_table(path: str, rows: List[Dict[str, Any]], kinds: Dict[str, float], seconds: float) -> None:
    busy = sum(kinds.values())
    lines = [f"one micro-batch: {1e3 * seconds:.2f} ms, in kernels {1e3 * busy:.2f} ms", ""]
    lines += [f"{1e3 * value:9.3f} ms  {100 * value / busy:5.1f} %  {kind}" for kind, value in kinds.items()] + [""]
    for row in rows:
        share = 100 * row["share"]
        lines.append(f"{1e3 * row['seconds']:9.3f} ms  {share:5.1f} %  {row['calls']:5} calls  {row['kernel'][:160]}")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def whole_run(bench: Bench, figures: Figures) -> str:
    """The training loop with its loader, on random shards: sequences/s, and the share of a step that waits for data."""
    bench.release()
    config, count = bench.config("gpu_phase1.json"), 24 if bench.tiny else 16384
    sizes = config.data.sequence_length, config.data.mask_tokens, config.model.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data.files": write_data_set(folder, "wikipedia", 4 * count, *sizes),
            "data.workers": min(8, os.cpu_count() or 1),
            "training.output": os.path.join(folder, "run"),
            "training.global_batch_size": count,
            "training.max_steps": 4,
            "training.log_every": 1,
        }
        train(
            bench.config(
                "gpu_phase1.json", *(word for key, value in options.items() for word in (f"--{key}", str(value)))
            )
        )
        with open(os.path.join(folder, "run", "metrics.jsonl"), encoding="utf-8") as lines:
            steps = [json.loads(line) for line in lines][1:]  # the first compiles
    for name in ("data_wait_fraction", "sequences_per_second"):
        figures[name] = median([step[name] for step in steps])
    waits = f"{100 * figures['data_wait_fraction']:.2f} % of a step waits for data"
    return f"{figures['sequences_per_second']:.5g} sequences/s, {waits}"
