"""Sequences/s of pre-training: real samples through the whole step, and the share of the machine's matrix-product rate.

    python benchmarks/pretraining.py --config pod16_phase1.json --against transformers
    python benchmarks/pretraining.py --config pod16_phase2.json --lengths 369 --against transformers
    python benchmarks/pretraining.py --config gpu_phase1.json --data.files 'shards/train-*.h5' --json result.json

Options are run_pretraining.py's, and those below. Samples come from --data.files where they are there, else they are random, of a
given mean length. A peer gets the same samples, padded, as its users do. Useful work is counted by samples alone: 6 FLOPs for each
weight that a token passes and 12 L H for the attention products of each layer and token; padding does not count.
"""

import argparse
import glob
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks.report import median, print_table, write_json  # noqa: E402
from bert.config import parse_command_line  # noqa: E402
from bert.engines import choose_device  # noqa: E402
from bert.training import make_engine  # noqa: E402
from data.packing import mask_slots_of_row, pack  # noqa: E402
from data.rows import batch_layout, fill_packed, unpacked_batch, weigh  # noqa: E402
from data.shards import Samples, open_shards, read_samples, token_dtype  # noqa: E402


def make_samples(config, count, mean_length):
    """Samples of the data set, or random ones: all as long as can be, or lengths spread evenly around a mean."""
    data, vocab_size = config.data, config.model.vocab_size
    length, masks = data.sequence_length, data.mask_tokens
    if any(glob.glob(pattern) for pattern in data.files):
        shard = open_shards(data.files, length, masks, vocab_size)[0]
        return read_samples(shard.path, 0, count)
    rng = np.random.default_rng(0)
    mean = mean_length or length
    lengths = rng.integers(max(8, 2 * mean - length), length + 1, count).astype(np.uint16)
    counts = np.clip(np.round(0.15 * lengths), 1, masks).astype(np.uint16)
    inside, used = np.arange(length) < lengths[:, None], np.arange(masks) < counts[:, None]
    positions = 1 + np.arange(masks) * (lengths // (counts + 1))[:, None]
    ids = token_dtype(vocab_size)
    return Samples((rng.integers(min(1000, vocab_size // 2), vocab_size, (count, length)) * inside).astype(ids), lengths,
                   (lengths // 2).astype(np.uint16), (positions * used).astype(np.uint16),
                   (rng.integers(min(1000, vocab_size // 2), vocab_size, (count, masks)) * used).astype(ids), counts,
                   rng.integers(0, 2, count).astype(np.uint8))


def make_batch(config, samples):
    """The global batch of these samples, packed as the config says."""
    if config.data.packing == "off":
        return unpacked_batch(samples)
    length, per_row = config.data.sequence_length, config.data.samples_per_row
    slots = mask_slots_of_row(config.data.mask_tokens, per_row)
    packing = pack(samples.lengths, samples.mlm_counts, length, slots, per_row)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in batch_layout(packing.rows, length, slots, per_row).items()}
    order = np.lexsort((packing.place, packing.row))
    fill_packed(batch, samples.take(order), *(field[order] for field in packing[1:]))
    weigh(batch)
    return batch


def useful_flops(model, samples):
    """FLOPs of forward and backward for these samples (see the module's docstring)."""
    hidden, tokens = model.hidden_size, samples.lengths.astype(np.float64)
    layer = 4 * hidden * hidden + 2 * hidden * model.intermediate_size
    encoder = model.num_hidden_layers * (6 * layer * tokens.sum() + 12 * hidden * (tokens ** 2).sum())
    return encoder + 6 * samples.mlm_counts.sum(dtype=np.float64) * (hidden * hidden + hidden * model.vocab_size)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, work):
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def gemm_rate(device, hidden, intermediate, bfloat16, tokens):
    """FLOP/s of one matrix product as the feed-forward layer has it, on random data, over about a second; the best of five."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    a = torch.randn(tokens, hidden, device=device, dtype=dtype)
    b = torch.randn(hidden, intermediate, device=device, dtype=dtype)
    flops = 2 * tokens * hidden * intermediate
    timed(device, lambda: a @ b)
    repeat = max(1, int(0.2 / timed(device, lambda: a @ b)))
    return max(flops * repeat / timed(device, lambda: [a @ b for _ in range(repeat)]) for _ in range(5))


class Ours:
    """This project's engine: the micro-batches of a packed batch, then LAMB."""

    def __init__(self, config, device, samples):
        self.engine, self.batch = make_engine(config, device), make_batch(config, samples)
        self.update, self.update_seconds = self.engine.optimizer.step, []
        self.engine.optimizer.step = lambda: self.update_seconds.append(timed(device, self.update))

    def step(self):
        self.engine.step(self.batch, 1e-4, self.engine.steps_done + 1)


class Transformers:
    """transformers' BertForPreTraining on padded samples: SDPA, bfloat16 on CUDA, fused AdamW."""

    def __init__(self, config, device, samples, compiled):
        from transformers import BertConfig, BertForPreTraining
        model, self.device = config.model, device
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps",
                 "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob")
        self.model = BertForPreTraining(BertConfig(**{name: getattr(model, name) for name in names}, attn_implementation="sdpa"))
        self.model = self.model.to(device).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.update, self.update_seconds = optimizer.step, []
        batch = unpacked_batch(samples)
        labels = np.full(batch["input_ids"].shape, -100, np.int64)
        rows, slots = np.nonzero(batch["mlm_weights"])
        labels[rows, batch["mlm_positions"][rows, slots]] = batch["mlm_labels"][rows, slots]
        self.batch = {"input_ids": batch["input_ids"].astype(np.int64), "attention_mask": batch["sample_ids"].astype(np.int64),
                      "token_type_ids": batch["token_type_ids"].astype(np.int64), "labels": labels,
                      "next_sentence_label": batch["nsp_labels"][:, 0].astype(np.int64)}
        self.micro_batch_size = max(1, (2 ** 20 if device == "cpu" else 24 * 2 ** 20) // (labels.shape[1] * model.hidden_size))

    def step(self):
        rows = len(self.batch["labels"])
        for first in range(0, rows, self.micro_batch_size):
            part = {name: torch.from_numpy(array[first:first + self.micro_batch_size]).to(self.device)
                    for name, array in self.batch.items()}
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = self.forward(**part).loss
            (loss * len(part["labels"]) / rows).backward()
        self.update_seconds.append(timed(self.device, self.update))
        self.model.zero_grad()


def run(own, config):
    device, _ = choose_device(config.device)
    samples = make_samples(config, own.samples or (32 if device == "cpu" else 4096), own.lengths)
    ways = {"this project": Ours(config, device, samples)}
    if own.against:
        ways["transformers"] = Transformers(config, device, samples, own.peer_compile)
    bfloat16 = device == "cuda"
    seconds, updates, rates = {name: [] for name in ways}, {}, []
    for way in ways.values():
        way.step()  # compiles, allocates
        way.update_seconds.clear()
    for _ in range(own.rounds):
        rates.append(gemm_rate(device, config.model.hidden_size, config.model.intermediate_size, bfloat16,
                               1024 if device == "cpu" else 16384))
        for name, way in ways.items():
            seconds[name].append(timed(device, way.step))
    flops, rows, gemm = useful_flops(config.model, samples), [], median(rates)
    results = {"gemm_flops_per_second": gemm}
    for name, way in ways.items():
        updates[name] = median(way.update_seconds)
        passes = median([whole - update for whole, update in zip(seconds[name], way.update_seconds)])
        # At the recipe's global batch the update is shared by more samples than are measured here.
        per_sample = passes / len(samples) + updates[name] / config.training.global_batch_size
        results[name] = {"sequences_per_second": 1 / per_sample, "tokens_per_second": samples.lengths.mean() / per_sample,
                         "share_of_gemm_rate": flops / len(samples) / per_sample / gemm, "update_seconds": updates[name],
                         "passes_seconds": passes, "rounds": seconds[name]}
    for name, one in results.items():
        if name in ways:
            rows.append([name, "%.3g" % one["sequences_per_second"], "%.4g" % one["tokens_per_second"],
                         "%.0f %%" % (100 * one["share_of_gemm_rate"]), "%.3f" % one["update_seconds"],
                         "%.2f" % (results["this project"]["sequences_per_second"] / one["sequences_per_second"])])
    print("%d samples of mean length %.1f of %d, in %d rows; matrix product %.1f GFLOP/s; medians of %d rounds" % (
        len(samples), samples.lengths.mean(), config.data.sequence_length, len(ways["this project"].batch["input_ids"]), gemm / 1e9,
        own.rounds))
    print_table(["", "sequences/s", "tokens/s", "of the matrix rate", "update, s", "this project is faster by"], rows)
    if device == "cuda":
        results["peak_bytes"] = torch.cuda.max_memory_allocated()
    write_json(own.json, results, torch=torch.__version__, device=torch.cuda.get_device_name() if device == "cuda" else "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--samples", type=int, help="samples of a step (default: 32 on the CPU, 4096 on CUDA)")
    parser.add_argument("--lengths", type=int, help="mean length of random samples (default: all are full)")
    parser.add_argument("--against", choices=["transformers"], help="measure this peer in turns")
    parser.add_argument("--peer-compile", action="store_true", help="torch.compile the peer")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    own, others = parser.parse_known_args()
    run(own, parse_command_line(others))


if __name__ == "__main__":
    main()
