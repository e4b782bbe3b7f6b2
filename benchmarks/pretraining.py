"""Sequences/s of pre-training: real samples through the whole step, and the share of the machine's matrix-product rate.

    python benchmarks/pretraining.py --config pod16_phase1.json --against transformers
    python benchmarks/pretraining.py --config pod16_phase2.json --lengths 369 --against transformers
    python benchmarks/pretraining.py --config gpu_phase1.json --data.files 'shards/train-*.h5' --json result.json

Options are run_pretraining.py's, and those below. Samples come from the config's shards where they are there and no
--lengths asks for random ones. Each way runs in a process of its own, so that memory, allocator settings and compiled
code are its own; they take turns, and the others idle. A peer gets the same samples, padded, as its users do; both
begin with arrays on the host and end with new weights.

Useful work is counted by samples alone: 6 FLOPs for each weight that a token passes and 12 L H for the attention
products of each layer and token; padding does not count. The parts of a step are timed in rounds of their own, as the
device must be waited for between them. An optimizer step is shared by the samples of the config's global batch, which
are more than are measured here.
"""

import contextlib
import dataclasses
import glob
import itertools
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.processes import Worker
from benchmarks.report import make_parser, median, print_table, write_json
from benchmarks.synthetic import length_distribution, random_samples
from benchmarks.timing import Stopwatch, cuda_or_cpu, device_name, gemm_rate, timed
from bert.command_line import parse_command_line
from bert.engines import make_engine
from bert.engines.torch_devices import Cpu, Cuda, choose_precision
from bert.text import count_of
from data.errors import InputError
from data.loading.shard_files import open_shards, read_checked
from data.rows import packed_batch, unpacked_batch

PARTS = ("data", "forward", "backward", "optimizer")
# Rows x common size x columns. On CUDA the best of them counts: which one is, depends on the card.
GEMM_SHAPES = {"cpu": [(1024, 768, 3072)], "cuda": [(8192, 8192, 8192), (16384, 4096, 4096), (65536, 768, 3072)]}
# Token slots of the micro-batches that the peer tries: 8 to 32 rows of 128 on the CPU, 64 to 512 on CUDA.
PEER_TOKENS = {"cpu": [1024, 2048, 4096], "cuda": [8192, 16384, 32768, 65536]}


def make_samples(config, count, lengths):
    """(samples, where they are from): the first of the config's shards, or random ones if `lengths` is not None."""
    data, vocab_size = config.data, config.model.vocab_size
    if lengths is None:
        shard = open_shards(data.files, data.sequence_length, data.mask_tokens, vocab_size)[0]
        return read_checked(shard, 0, min(count, shard.num_samples), 0), shard.path
    rng = np.random.default_rng(0)
    samples = random_samples(lengths, count, data.sequence_length, data.mask_tokens, vocab_size, rng)
    return samples, f"random, lengths: {lengths}"


def make_batch(config, samples):
    """The global batch of these samples, packed as the config says."""
    if config.data.packing == "off":
        return unpacked_batch(samples)
    return packed_batch(samples, config.data.samples_per_row)


def useful_flops(model, samples):
    """FLOPs of forward and backward for these samples (see the module's docstring)."""
    hidden, tokens = model.hidden_size, samples.lengths.astype(np.float64)
    layer = 4 * hidden * hidden + 2 * hidden * model.intermediate_size
    encoder = model.num_hidden_layers * (6 * layer * tokens.sum() + 12 * hidden * (tokens**2).sum())
    return encoder + 6 * samples.mlm_counts.sum(dtype=np.float64) * (hidden * hidden + hidden * model.vocab_size)


def in_bfloat16(config, device):
    """Whether the matrix products of this project are in bfloat16 or less: the product that is measured is then in
    bfloat16, and the peer may be."""
    return choose_precision(Cuda() if device == "cuda" else Cpu(), config.training.precision) != "float32"


class Ours:
    """This project's engine: the micro-batches of a packed batch, then LAMB."""

    def __init__(self, device, config, samples):
        self.device, self.engine, self.batch = device, make_engine(config, device), make_batch(config, samples)
        self.engine.expect_rows(len(self.batch["input_ids"]))

    def describe(self):
        return f"{self.engine.describe()}; {len(self.batch['input_ids'])} rows"

    def step(self):
        self.engine.step(self.batch, 1e-4, self.engine.steps_done + 1)

    def measure(self):
        return self.engine.measure(self.batch)


class Transformers:
    """transformers' BertForPreTraining on padded samples: SDPA, fused AdamW.

    `rows` is the size of its micro-batches, `bfloat16` whether it has autocast; `choose` finds the best.
    """

    def __init__(self, device, config, samples, compiled, rows=None, bfloat16=False):
        from transformers import BertConfig, BertForPreTraining

        if device == "cpu":
            Cpu().start(
                keeps_memory=True
            )  # keeps the memory of freed tensors, as this project does: up to half as fast again
        self.device, self.compiled, self.rows, self.bfloat16 = device, compiled, rows, bfloat16
        self.types = [False, True] if device == "cpu" and in_bfloat16(config, device) else [in_bfloat16(config, device)]
        settings = BertConfig(**dataclasses.asdict(config.model), attn_implementation="sdpa")
        self.model = BertForPreTraining(settings).to(device).train()
        # Every micro-batch but a last, smaller one has the same shape: code for that shape is faster than for any.
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        batch = unpacked_batch(samples)
        labels = np.full(batch["input_ids"].shape, -100, np.int64)
        at, slots = np.nonzero(batch["mlm_weights"])
        labels[at, batch["mlm_positions"][at, slots]] = batch["mlm_labels"][at, slots]
        self.batch = {
            "input_ids": batch["input_ids"].astype(np.int64),
            "attention_mask": batch["sample_ids"].astype(np.int64),
            "token_type_ids": batch["token_type_ids"].astype(np.int64),
            "labels": labels,
            "next_sentence_label": batch["nsp_labels"][:, 0].astype(np.int64),
        }

    def describe(self):
        precision = "bfloat16 autocast" if self.bfloat16 else "float32"
        compiled = "torch.compile" if self.compiled else "not compiled"
        rows = len(self.batch["labels"])
        return f"{precision}, SDPA, micro-batches of {self.rows} rows, {compiled}; {rows} rows"

    def step(self):
        self.passes(len(self.batch["labels"]))
        self.optimizer.step()
        self.model.zero_grad()

    def measure(self):
        """Seconds of the parts of a step; the device is waited for after each."""
        watch, count = Stopwatch(self.device), len(self.batch["labels"])
        for part in watch.around_each("data", self.micro_batches)(count):
            with watch.part("forward"):
                loss = self.forward(part) * (len(part["labels"]) / count)
            with watch.part("backward"):
                loss.backward()
        with watch.part("optimizer"):
            self.optimizer.step()
        self.model.zero_grad()
        return watch.seconds

    def passes(self, count):
        for part in self.micro_batches(count):
            (self.forward(part) * (len(part["labels"]) / count)).backward()

    def micro_batches(self, count):
        for first in range(0, count, self.rows):
            rows = slice(first, min(first + self.rows, count))
            yield {name: torch.from_numpy(array[rows]).to(self.device) for name, array in self.batch.items()}

    def forward(self, part):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            return self.run(**part).loss

    def choose(self):
        """Tries micro-batches, each over as many rows as the largest has, in the types that there are: in float32, and
        with autocast. Returns {(rows, bfloat16): seconds}."""
        count, length = self.batch["labels"].shape
        sizes, tried = sorted({min(count, max(1, tokens // length)) for tokens in PEER_TOKENS[self.device]}), {}
        for bfloat16, rows in itertools.product(self.types, sizes):
            self.bfloat16, self.rows = bfloat16, rows
            try:
                self.passes(rows)  # the first of a size is slow
                tried[rows, bfloat16] = timed(self.device, lambda: self.passes(sizes[-1]))
            except torch.cuda.OutOfMemoryError:
                break  # a larger one will not fit either
        return tried


def free(way):
    """Gives a CUDA device's unused memory to the other ways, between turns."""
    if way.device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def turn(way):
    """While open, `way` has the device. On CUDA an untimed step first brings its clocks up and its memory back."""
    if way.device == "cuda":
        way.step()
    yield
    free(way)


def timed_step(way):
    with turn(way):
        return timed(way.device, way.step)


def timed_parts(way):
    with turn(way):
        return way.measure()


def first_step(way):
    if way.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the search for a micro-batch
    way.step()  # compiles
    free(way)
    return way.describe()


def peak_bytes(way):
    """The most memory in use so far: of the device, or on the CPU of the process with all that it imports."""
    if way.device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(own, config, device, samples):
    """{"gemm": ..., "ways": {name: ...}}, all measured in turns."""
    tried, dtype = None, torch.bfloat16 if in_bfloat16(config, device) else torch.float32
    with contextlib.ExitStack() as closing:
        if own.against:
            with Worker(Transformers, device, config, samples, False) as chooser:
                tried = chooser.ask(Transformers.choose)
        ways = {"this project": closing.enter_context(Worker(Ours, device, config, samples))}
        if own.against:
            peer = Worker(Transformers, device, config, samples, own.peer_compile, *min(tried, key=tried.get))
            ways["transformers"] = closing.enter_context(peer)
        figures = {name: {"settings": way.ask(first_step), "rounds": []} for name, way in ways.items()}
        gemm = {shape: [] for shape in GEMM_SHAPES[device]}
        for _ in range(own.rounds):
            for shape, rates in gemm.items():
                rates.append(gemm_rate(device, shape, dtype))
            for name, way in ways.items():
                figures[name]["rounds"].append(way.ask(timed_step))
        for name, way in ways.items():
            parts = [way.ask(timed_parts) for _ in range(own.rounds)]
            figures[name]["parts"] = {part: median([seconds[part] for seconds in parts]) for part in PARTS}
            figures[name]["peak_bytes"] = way.ask(peak_bytes)
    if own.against:
        names = {False: "float32", True: "bfloat16"}
        tried = {f"{rows} rows, {names[bfloat16]}": seconds for (rows, bfloat16), seconds in tried.items()}
        figures["transformers"]["micro_batches_tried"] = tried
    best = max(gemm, key=lambda shape: median(gemm[shape]))
    return {"gemm": {"shape": best, "dtype": str(dtype), "flops_per_second": median(gemm[best])}, "ways": figures}


def run(own, config, named_files):
    device = cuda_or_cpu(config)
    has_shards = named_files or any(glob.glob(pattern) for pattern in config.data.files)
    lengths = own.lengths or (None if has_shards else "wikipedia")
    samples, origin = make_samples(config, own.samples or (32 if device == "cpu" else 4096), lengths)
    results = measure(own, config, device, samples)
    gemm, ways, rows = results["gemm"], results["ways"], []
    flops, mean_length = useful_flops(config.model, samples) / len(samples), samples.lengths.mean()
    for name, way in ways.items():
        update = way["parts"]["optimizer"]
        seconds = (median(way["rounds"]) - update) / len(samples) + update / config.training.global_batch_size
        way.update(
            sequences_per_second=1 / seconds,
            tokens_per_second=mean_length / seconds,
            share_of_gemm_rate=flops / seconds / gemm["flops_per_second"],
        )
        rates = [f"{way[rate]:.4g}" for rate in ("sequences_per_second", "tokens_per_second")]
        parts = [f"{way['parts'][part]:.3g}" for part in PARTS]
        share, peak = f"{100 * way['share_of_gemm_rate']:.0f} %", f"{way['peak_bytes'] / 1e9:.2f}"
        faster = ways["this project"]["sequences_per_second"] / way["sequences_per_second"]
        rows.append([name, *rates, share, *parts, peak, f"{faster:.2f}"])
        print(f"{name}: {way['settings']}")
    lengths = f"mean length {mean_length:.1f} of {config.data.sequence_length}"
    print(f"{len(samples)} samples of {lengths} ({origin}); medians of {count_of(own.rounds, 'round')}")
    m, k, n = gemm["shape"]
    print(f"matrix product: {gemm['flops_per_second'] / 1e12:.4g} TFLOP/s, {m} x {k} by {k} x {n}, {gemm['dtype']}")
    parts = [f"{part}, s" for part in PARTS]
    print_table(["", "sequences/s", "tokens/s", "of that rate", *parts, "peak, GB", "this project is faster by"], rows)
    about = {
        "samples": len(samples),
        "samples_from": origin,
        "mean_length": mean_length,
        "precision": config.training.precision,
        "sequence_length": config.data.sequence_length,
        "model": dataclasses.asdict(config.model),
    }
    write_json(own.json, {**about, **results}, torch=torch.__version__, device=device_name(device))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, help="samples of a step (default: 32 on the CPU, 4096 on CUDA)")
    parser.add_argument(
        "--lengths",
        type=length_distribution,
        metavar="full|MEAN|wikipedia",
        help="random samples of these lengths (default: the config's shards, or wikipedia where there are none)",
    )
    parser.add_argument("--against", choices=["transformers"], help="measure this peer in turns")
    parser.add_argument("--peer-compile", action="store_true", help="torch.compile the peer")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns (default: %(default)s)")
    own, others = parser.parse_known_args()
    try:
        run(own, parse_command_line(others), any(option.split("=")[0] == "--data.files" for option in others))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
