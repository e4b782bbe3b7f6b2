"""Whether training is right on a GPU: gradients, steps, LAMB, float8, the micro-batch that is found, and resuming.

Each is compared with float32 or float64 in PyTorch's own operations on the same device, in the recipe's model.
"""

import contextlib
import math
import tempfile
from typing import Any, Dict, Iterator, List

import numpy as np
import torch

from benchmarks.gpu_checks import error_of, require
from benchmarks.gpu_items import Bench, Figures, Item, Skip, Wrong
from benchmarks.synthetic import random_samples
from benchmarks.timing import timed
from bert.config import Config
from bert.engines import Engine, make_engine
from bert.engines.engine import Arrays
from bert.engines.micro_batch import full_rows
from bert.engines.torch_engine import TorchEngine
from bert.geometry import row_shape
from bert.run.checkpoint import load_optimizer_state, load_weights, save_checkpoint, transformers_config
from data.errors import InputError
from data.rows import packed_batch
from data.tokenizer import SPECIAL_TOKENS, Vocabulary
from ops.lamb import lamb_groups, lamb_plain

__all__ = ["training_checks"]

NO_DROPOUT = "--model.hidden_dropout_prob", "0", "--model.attention_probs_dropout_prob", "0"
# Adding the same to all scores changes no softmax: this gradient is 0 but for rounding.
WITHOUT_GRADIENT = "attention.self.key.bias"
STEPS = 20  # of the losses that are compared


def training_checks() -> List[Item]:
    return [
        Item("gradients", 45, gradients),
        Item("steps", 10, steps_without_waiting),
        Item("lamb", 15, lamb),
        Item("float8", 45, float8),
        Item("finder", 20, finder),
        Item("resume", 25, resume),
    ]


def make_batch(bench: Bench, seed: int = 0) -> Arrays:
    """A global batch of random samples, packed: two micro-batches and a part of one."""
    config = bench.config("gpu_phase1.json")
    data, count = config.data, (20 if bench.tiny else 150) + 3 * seed
    sizes, rng = (data.sequence_length, data.mask_tokens, config.model.vocab_size), np.random.default_rng(seed)
    samples = random_samples("wikipedia", count, *sizes, rng)
    return packed_batch(samples, data.samples_per_row)


def checked_config(bench: Bench, precision: str, *options: str) -> Config:
    """Of the model whose gradients and steps are checked: no dropout, micro-batches of 64 rows."""
    rows = "8" if bench.tiny else "64"
    fixed = ["--training.micro_batch_size", rows, "--training.precision", precision]
    return bench.config("gpu_phase1.json", *fixed, *NO_DROPOUT, *options)


def held_engine(bench: Bench, precision: str) -> TorchEngine:
    """As training runs it, held for the next item."""
    return bench.hold(f"engine, {precision}", lambda: make_engine(checked_config(bench, precision), bench.device))


def gradients_of(engine: TorchEngine, batch: Arrays) -> Dict[str, torch.Tensor]:
    """Parameter name -> the gradient of the global batch, float32."""
    engine.model.train()
    engine.clear_gradients()
    for _, micro_batch in engine.micro_batches(batch):
        engine.backward(engine.forward(micro_batch, {}))
    gradients = {name: weight.grad for name, weight in engine.master_weights.items()}
    without = [name for name, gradient in gradients.items() if gradient is None]
    if without:
        raise Wrong(f"{without[0]} has no gradient, and {len(without) - 1} more")
    engine.clear_gradients()
    return gradients


def exact_gradients(bench: Bench, weights: Dict[str, torch.Tensor], batch: Arrays) -> Dict[str, torch.Tensor]:
    """In float32, rows with a mask where there are kernels for bfloat16 only, not compiled; of these weights rounded to
    bfloat16, so that only what is computed with them differs."""
    engine = make_engine(checked_config(bench, "float32", "--training.compile", "off"), bench.device)
    engine.load_weights({name: weight.bfloat16().float() for name, weight in weights.items()})
    return gradients_of(engine, batch)


def compare_gradients(found: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> List[Dict[str, Any]]:
    """One row a parameter, the worst first: cosine, relative error, and by how much it is too long in the expected
    direction."""
    rows = []
    for name, slow in expected.items():
        fast, slow = found[name].double(), slow.double()
        along = (fast * slow).sum() / slow.norm().square().clamp(min=1e-300)
        cosine = along * slow.norm() / fast.norm().clamp(min=1e-300)
        row = {
            "parameter": name,
            "relative_error": error_of(fast, slow),
            "cosine": cosine.item(),
            "length": along.item(),
        }
        if not name.endswith(WITHOUT_GRADIENT):
            rows.append(row)
    # What is not finite is the worst of all.
    return sorted(rows, key=lambda row: -row["relative_error"] if math.isfinite(row["relative_error"]) else -math.inf)


def check_gradients(rows: List[Dict[str, Any]], figures: Figures, least_cosine: float, most: float) -> str:
    worst, median = rows[0], rows[len(rows) // 2]["relative_error"]
    figures["gradients"] = {"worst": rows[:10], "median_relative_error": median}
    for row in rows:
        require(f"the relative error of {row['parameter']}'s gradient", row["relative_error"], most)
        require(f"1 - the cosine of {row['parameter']}'s gradient", 1 - row["cosine"], 1 - least_cosine)
    require("the median of the gradients' relative errors", median, most / 2)
    error, cosine = f"error {worst['relative_error']:.2g}", f"cosine {worst['cosine']:.5f}"
    return f"median error {median:.2g}, worst of {len(rows)}: {worst['parameter']}, {error}, {cosine}"


def gradients(bench: Bench, figures: Figures) -> str:
    engine = held_engine(bench, "bfloat16")
    batch = make_batch(bench)
    found = gradients_of(engine, batch)
    figures["engine"] = engine.describe()
    if bench.device == "cuda" and not engine.compiled:
        raise Wrong(f"layers are not compiled: {engine.describe()}")
    rows = compare_gradients(found, exact_gradients(bench, engine.weights(), batch))
    return check_gradients(rows, figures, 0.99, 0.1)


def steps_without_waiting(bench: Bench, figures: Figures) -> str:
    """Two further steps, with other samples, in which the host waits for nothing and nothing is compiled again."""
    bench.needs_cuda("elsewhere the host does not wait, and layers are not compiled")
    engine = held_engine(bench, "bfloat16")
    batches = [make_batch(bench, seed) for seed in range(4)]
    for batch in batches[:2]:
        take_step(engine, batch)
    with errors_for_waiting():
        metrics = [engine.step(batch, 1e-4, engine.steps_done + 1) for batch in batches[2:]]
    engine.wait_for(engine.steps_done)
    figures["losses"] = [loss_of(engine, values) for values in metrics]
    if not all(map(math.isfinite, figures["losses"])):
        raise Wrong(f"losses are {figures['losses']}")
    return (
        f"two steps without a wait or a compilation, losses {figures['losses'][0]:.4f} and {figures['losses'][1]:.4f}"
    )


@contextlib.contextmanager
def errors_for_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_step(engine: Engine, batch: Arrays, learning_rate: float = 1e-4) -> float:
    """The loss of one more step."""
    metrics = engine.step(batch, learning_rate, engine.steps_done + 1)
    engine.wait_for(engine.steps_done)
    return loss_of(engine, metrics)


def loss_of(engine: Engine, metrics: Dict[str, torch.Tensor]) -> float:
    return sum(float(metrics[panel.loss]) for panel in engine.task.panels)


def lamb(bench: Bench, figures: Figures) -> str:
    """Updates of the whole model against float64, the rounded weights, and that an Inf gradient changes nothing."""
    bench.release()
    config = checked_config(bench, "bfloat16")
    engine = make_engine(config, bench.device)
    weights, optimizer = engine.master_weights, engine.optimizer
    exact = {name: weight.detach().double() for name, weight in weights.items()}
    moments = [[torch.zeros_like(weight) for weight in exact.values()] for _ in range(2)]
    groups = {
        name: group for group in lamb_groups(weights.items(), config.optimizer.weight_decay) for name in group["names"]
    }
    fixed = {"betas": config.optimizer.betas, "eps": config.optimizer.eps}
    travelled = {name: weight.norm() for name, weight in exact.items()}
    for step in range(3):
        for weight in weights.values():
            weight.grad = torch.randn_like(weight) * 10.0 ** (-step)
        before = {name: weight.clone() for name, weight in exact.items()}
        optimizer.step(0.006)
        options = [{**groups[name], **fixed, "lr": 0.006} for name in exact]
        slopes = [weights[name].grad.double() for name in exact]
        skipped = torch.zeros((), dtype=torch.int64, device=bench.device)
        lamb_plain(list(exact.values()), slopes, *moments, [None] * len(exact), options, skipped)
        for name, weight in exact.items():
            travelled[name] += (weight - before[name]).norm()
    errors = {name: ((weights[name] - exact[name]).norm() / travelled[name]).item() for name in exact}
    worst = max(errors, key=lambda name: errors[name])
    count = sum(weight.numel() for weight in weights.values())
    figures.update(parameters=count, worst=worst, worst_error=errors[worst])
    require(f"the error of {worst}, relative to the way it went,", errors[worst], 3e-6)
    for name, parameter in engine.model.named_parameters():
        if not torch.equal(parameter, weights[name].to(parameter.dtype)):
            raise Wrong(f"{name} is not the rounded master weight")
    figures["seconds"] = timed(bench.device, lambda: optimizer.step(0.0), 1 if bench.tiny else 20)
    figures["bytes_per_second"] = 40 * count / figures["seconds"]
    check_infinite_gradient(engine)
    rate = f"{1e3 * figures['seconds']:.2f} ms, {figures['bytes_per_second'] / 1e9:.0f} GB/s"
    return f"{count:,} parameters, worst error {errors[worst]:.1g}, {rate}, an infinite gradient skipped"


def check_infinite_gradient(engine: TorchEngine) -> None:
    tensors = [*engine.master_weights.values(), *engine.model.parameters()]
    moments = {name: tensor.clone() for name, tensor in engine.optimizer_state().items()}
    before, skipped = [tensor.detach().clone() for tensor in tensors], engine.skipped_updates()
    list(engine.master_weights.values())[-1].grad.view(-1)[-1] = math.inf
    engine.optimizer.step(0.006)
    if engine.skipped_updates() != skipped + 1:
        raise Wrong("an update with an infinite gradient is not counted as skipped")
    state = engine.optimizer_state()
    if not all(map(torch.equal, tensors, before)) or not all(torch.equal(state[name], moments[name]) for name in state):
        raise Wrong("an update with an infinite gradient changes weights or moments")


def float8(bench: Bench, figures: Figures) -> str:
    """Gradients against float32, and the losses of some steps beside those of bfloat16."""
    batch, losses = make_batch(bench), {}
    for precision in ("float8", "bfloat16"):
        bench.release()
        try:
            engine = make_engine(checked_config(bench, precision), bench.device)
        except InputError as error:
            raise Skip(str(error))
        if precision == "float8":
            rows = compare_gradients(gradients_of(engine, batch), exact_gradients(bench, engine.weights(), batch))
            line = check_gradients(rows, figures, 0.95, 0.4)
        losses[precision] = [take_step(engine, batch, 2e-3) for _ in range(STEPS)]
    figures["losses"] = losses
    fall = losses["bfloat16"][0] - losses["bfloat16"][-1]
    apart = max(abs(one - other) for one, other in zip(*losses.values()))
    if not fall > 0.1:
        raise Wrong(f"in bfloat16 {STEPS} steps lower the loss by {fall:.3g}, too little to compare")
    require("the distance of the losses in float8 and bfloat16, of what they fall by,", apart / fall, 0.1)
    return f"{line}; losses at most {apart:.2g} from bfloat16's, which fall by {fall:.3g}"


def finder(bench: Bench, figures: Figures) -> str:
    """The micro-batch that is found where a tenth of the card may be used, and two steps of it."""
    bench.needs_cuda("elsewhere memory does not limit a micro-batch")
    bench.release()
    _, total = torch.cuda.mem_get_info()
    share = min(1.0, max(0.1, 8e9 / total))  # weights, moments and gradients are 2 GB
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        config = bench.config("gpu_phase1.json", "--training.compile", "off")
        engine = make_engine(config, bench.device)
        figures.update(share_of_memory=share, micro_batch_size=engine.micro_batch_size)
        batch = full_rows(2 * engine.micro_batch_size, row_shape(config, static=False), engine.task.targets)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            take_step(engine, batch, 0.0)
        figures.update(peak_bytes=torch.cuda.max_memory_allocated(), micro_batch_size_after=engine.micro_batch_size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    require("memory in use", figures["peak_bytes"], share * total)
    rows = f"{figures['micro_batch_size']} rows found, {figures['micro_batch_size_after']} after two steps"
    return f"{rows}, {figures['peak_bytes'] / 1e9:.2f} GB of {share * total / 1e9:.2f} GB"


def resume(bench: Bench, figures: Figures) -> str:
    """A checkpoint gives another engine the same state, bit for bit, and the same next step."""
    bench.release()
    rows = "8" if bench.tiny else "64"
    config = bench.config("gpu_phase1.json", "--training.micro_batch_size", rows, "--training.precision", "bfloat16")
    batch = make_batch(bench)
    first, second = [make_engine(config, bench.device) for _ in range(2)]
    for _ in range(2):
        take_step(first, batch)
    tokens = [*SPECIAL_TOKENS, *(f"word{number}" for number in range(len(SPECIAL_TOKENS), config.model.vocab_size))]
    model = transformers_config(config.model, first.model.architecture, first.task.architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(
            folder, {"step": 2}, first.weights(), first.optimizer_state(), model, Vocabulary(tokens), 1
        )
        saved = load_weights(path, first.master_weights, model), load_optimizer_state(path)
    load(second, *saved)
    for name, one, other in (
        ("weights", first.weights(), second.weights()),
        ("moments", first.optimizer_state(), second.optimizer_state()),
    ):
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            raise Wrong(f"{name} are not what was saved")
    ends = {}
    for way, engine in (("uninterrupted", first), ("resumed", second), ("repeated", first)):
        if way == "repeated":
            load(engine, *saved)
        loss = take_step(engine, batch)
        ends[way] = loss, torch.cat([weight.flatten() for weight in engine.weights().values()])
    figures["losses"] = {way: loss for way, (loss, _) in ends.items()}
    # Where additions on the device are in no fixed order, the same step twice is not bit for bit the same either.
    figures["apart"] = apart = {
        way: error_of(ends[way][1], ends["uninterrupted"][1]) for way in ("resumed", "repeated")
    }
    if len(set(figures["losses"].values())) > 1:
        raise Wrong(f"the losses of the step after the checkpoint are {figures['losses']}")
    require("the distance of the resumed run's weights", apart["resumed"], 10 * apart["repeated"])
    repeats = "bit for bit" if not any(apart.values()) else f"to {max(apart.values()):.1g}, as a repeated step does"
    return f"the state comes back bit for bit, and the next step {repeats}"


def load(engine: TorchEngine, weights: Dict[str, torch.Tensor], optimizer_state: Dict[str, torch.Tensor]) -> None:
    engine.load_weights(weights)
    engine.load_optimizer_state(optimizer_state, 0)
    engine.steps_done = 2
