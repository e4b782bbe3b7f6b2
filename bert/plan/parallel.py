"""What each process of a run on CUDA or CPU holds and sends, and how long a pipeline waits: by formulae.

Letters: P processes of a pipeline, v stages of each, N copies of the pipeline (data-parallel ranks), m micro-batches of
a step in each copy, T tokens of a micro-batch, H hidden, I intermediate, A heads, V vocabulary.
"""

import os
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import nn

from bert.config import Config, ModelConfig
from bert.engines import expected_of_torch
from bert.engines.parallel.pipeline import ROUND, modules_of
from bert.model.stages import pipeline_stages
from bert.plan.tables import table
from bert.tasks import make_model, make_task
from bert.text import count_of, percent
from bert.validation import asks_for_cuda
from data.errors import InputError

__all__ = ["Held", "Memory", "Workload", "bubble", "bytes_sent", "head_bytes", "held_by", "layer_bytes"]
__all__ += ["memory_of_ranks", "micro_batches_kept", "parallel_lines", "processes_of", "state_memory", "value_bytes"]

FLOAT32 = 4
MOMENTS = 2  # of LAMB and AdamW
MEMORY_PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "received")


class Held(NamedTuple):
    """How many parameters a process computes with."""

    together: int
    rest: int
    """In no layer: embeddings, heads."""
    layer: int
    """Of one layer."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its fullest, where a backward pass begins."""

    blocks: str
    """Which part of the model it is of, in words."""
    held: Held
    weights: float
    """In the type that the model computes in, and in float32 where that is another."""
    gradients: float
    optimizer: float
    gathered: float
    """Weights of other processes, and gradients for them, that are there for a moment."""
    activations: float
    """With the gradients of the layer whose backward pass is under way (2 H and 2 I of a token)."""
    received: float
    """Room for what comes from the stages before and after, of each micro-batch of a round."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.received


class Workload(NamedTuple):
    """How a step is cut."""

    precision: str
    """float32, bfloat16 or float8."""
    copies: int
    """N"""
    micro_batches: int
    """m"""
    tokens: int
    """T"""
    masked: int
    """Masked tokens of a micro-batch."""
    logit_bytes: int
    """Of the part of the logits that is there at a time, at most."""
    packs: bool
    """Whether whole weights are packed for products, both ways (ops/native.py)."""


def bubble(processes: int, stages_per_process: int, micro_batches: int) -> float:
    """The share of a step in which a process of a pipeline waits for it to fill and drain: (P - 1) / (v m + P - 1), in
    both 1F1B and its interleaved form (arXiv 2104.04473, 2.2)."""
    return (processes - 1) / (stages_per_process * micro_batches + processes - 1)


def micro_batches_kept(rank: int, processes: int, stages_per_process: int, micro_batches: int) -> float:
    """Of how many micro-batches process `rank` of a pipeline keeps the activations of its layers, as
    torch.distributed.pipelining does them in 1F1B and interleaved 1F1B: P - rank without stages to interleave."""
    if stages_per_process == 1:
        return min(micro_batches, processes - rank)
    ahead = (stages_per_process - 1) * processes + 2 * (processes - 1 - rank) + 1
    return min(stages_per_process * micro_batches, ahead) / stages_per_process


def value_bytes(precision: str) -> int:
    """Of a weight or an activation that the model computes with."""
    return FLOAT32 if precision == "float32" else 2


def layer_bytes(model: ModelConfig, precision: str) -> int:
    """What an encoder layer keeps of a token for its backward pass, with the kernels of ops/: its input, Q, K and V,
    the context, what is before both LayerNorms, the attention's output (8 H in all), what is before and after GELU (2
    I); in float32 a normaliser of each head, and the mean and deviation of both LayerNorms."""
    kept = 8 * model.hidden_size + 2 * model.intermediate_size
    return value_bytes(precision) * kept + FLOAT32 * (model.num_attention_heads + 4)


def head_bytes(model: ModelConfig, precision: str, masked: int, logit_bytes: int) -> int:
    """What the heads keep and hold while they run: of a masked token the input, what is before and after GELU, the
    decoder's input and its gradient (5 H); the decoder's gradient in float32, and a part of the logits."""
    size = value_bytes(precision)
    logits = min(logit_bytes, size * masked * model.vocab_size)
    return size * 5 * model.hidden_size * masked + FLOAT32 * model.vocab_size * model.hidden_size + logits


def state_memory(held: Held, shard: str, copies: int, precision: str) -> Dict[str, float]:
    """weights, gradients, optimizer and gathered bytes of a process.

    The model computes with weights of 4 or 2 bytes; the optimizer has its own float32 ones where they are 2, and
    wherever there are shards; gradients are added up in float32. With `shard` optimizer, 1/N of the float32 weights and
    moments is kept; with full 1/N of everything, and the weights are gathered for two layers at a time and, while they
    are used, for what is in no layer, and a layer's gradients are made in both types.
    """
    size, all_float32 = value_bytes(precision), FLOAT32 * held.together
    computed, own = size * held.together, 1 / copies
    moments = MOMENTS * all_float32
    if shard == "none" or copies == 1:
        weights: float = computed if size == FLOAT32 else computed + all_float32
        return {"weights": weights, "gradients": all_float32, "optimizer": moments, "gathered": 0}
    if shard == "optimizer":
        weights = computed + own * all_float32
        return {"weights": weights, "gradients": all_float32, "optimizer": own * moments, "gathered": 0}
    gathered = size * (held.rest + 2 * held.layer) + (size + FLOAT32) * held.layer
    weights, gradients = own * all_float32, own * all_float32
    return {"weights": weights, "gradients": gradients, "optimizer": own * moments, "gathered": gathered}


def memory_of_ranks(config: Config, work: Workload) -> List[Memory]:
    """Of each process of one pipeline; of the only kind there is, without one.

    Raises InputError for a pipeline of more stages than the model has layers.
    """
    parallel, model, size = config.parallel, config.model, value_bytes(work.precision)
    with torch.device("meta"):
        blocks = dict(make_model(config, make_task(config)).blocks)
    stages = pipeline_stages(list(blocks), parallel.pipeline, parallel.stages_per_process)
    embedded, under_way = size * model.hidden_size, size * 2 * (model.hidden_size + model.intermediate_size)
    ranks = []
    for rank in range(parallel.pipeline):
        runs = [stage.blocks for stage in stages if stage.ipu == rank]
        names = [name for run in runs for name in run]
        held = held_by([blocks[name] for name in names], [blocks[name] for name in names if name.startswith("layer")])
        state = state_memory(held, parallel.shard, work.copies, work.precision)
        if work.packs and (parallel.shard == "none" or work.copies == 1):
            state["weights"] += 2 * size * held.together
        layers = sum(name.startswith("layer") for name in names)
        kept = micro_batches_kept(rank, parallel.pipeline, parallel.stages_per_process, work.micro_batches)
        of_token = kept * (layers * layer_bytes(model, work.precision) + embedded * (rank == 0)) + under_way
        activations = of_token * work.tokens
        if rank == parallel.pipeline - 1:
            activations += head_bytes(model, work.precision, work.masked, work.logit_bytes)
        borders = 2 * parallel.stages_per_process - (rank == 0) - (rank == parallel.pipeline - 1)
        received = borders * round_of(work, parallel.pipeline) * embedded * work.tokens
        words = ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
        ranks.append(Memory(words, held, **state, activations=activations, received=received))
    return ranks


def round_of(work: Workload, pipeline: int) -> int:
    """How many micro-batches go through a pipeline before it drains."""
    return min(-(-work.micro_batches // pipeline), ROUND) * pipeline


def held_by(blocks: Sequence[nn.Module], layers: Sequence[nn.Module]) -> Held:
    """The parameters of these blocks, `layers` among them."""

    def count(modules: Sequence[nn.Module]) -> int:
        return sum(
            parameter.numel()
            for parameter in {p for block in modules for module in modules_of(block) for p in module.parameters()}
        )

    return Held(count(blocks), count(blocks) - count(layers), max(count([layer]) for layer in layers))


def bytes_sent(held: Held, shard: str, copies: int, precision: str, micro_batches: int) -> float:
    """What a process sends to the other copies of its part of the model in a step, and receives, in rings.

    An all-reduce of x bytes sends 2 (N - 1) / N x, a reduce-scatter and an all-gather half of that each. Without shards
    float32 gradients are all-reduced; with `optimizer` they are reduce-scattered, and the new weights gathered; with
    full this is done in each micro-batch, and layers are gathered again in its backward pass.
    """
    size, layers = value_bytes(precision), held.together - held.rest
    once = (FLOAT32 + size) * held.together
    values = {"none": 2 * FLOAT32 * held.together, "optimizer": once, "full": micro_batches * (once + size * layers)}
    return (copies - 1) / copies * values[shard]


def processes_of(config: Config) -> Tuple[int, str]:
    """How many processes the plan is for, and words for where that comes from: torchrun's WORLD_SIZE, which may be set
    by hand, or the fewest that the config asks for."""
    parallel = config.parallel
    size = int(os.environ.get("WORLD_SIZE", 0))
    if size % parallel.pipeline:
        raise InputError(
            f"WORLD_SIZE is {size} processes, and parallel.pipeline {parallel.pipeline}: expected a multiple of it"
        )
    return size or parallel.pipeline * (1 if parallel.shard == "none" else 2), (
        ""
        if size
        else "the fewest that the config asks for. For 64: WORLD_SIZE=64 python run_pretraining.py ... --plan"
    )


def parallel_lines(config: Config, rows: int) -> List[str]:
    """What each process of a run with so many rows a step holds, sends and waits for, in lines for people; of a
    process alone, only what it holds on a card. The device need not be here.

    Raises InputError where the processes do not fit the config.
    """
    parallel, (size, where_from) = config.parallel, processes_of(config)
    if size == 1 and not asks_for_cuda(config):
        return []
    copies = size // parallel.pipeline
    precision, micro_batch, logit_bytes, packs = expected_of_torch(config)
    rows = -(-rows // copies)
    micro_batch = min(micro_batch, rows)
    micro_batches = -(-rows // micro_batch)
    tokens, masked = micro_batch * config.data.sequence_length, micro_batch * config.data.mask_tokens
    work = Workload(precision, copies, micro_batches, tokens, masked, logit_bytes, packs)
    pipeline = f"a pipeline of {parallel.pipeline} processes" if parallel.pipeline > 1 else "one process"
    all_rows = f"{rows:,} rows, {count_of(micro_batches, 'micro-batch', 'micro-batches')} of {micro_batch}"
    if size == 1:
        return [f"One process: {all_rows}, in {precision}", *memory_table(memory_of_ranks(config, work))]
    return [
        f"{count_of(size, 'process', 'processes')}: {count_of(copies, 'copy', 'copies')} of the model, each {pipeline}",
        *([f"  {where_from}"] if where_from else []),
        f"  a step of each copy: {all_rows}, in {precision}; parallel.shard {parallel.shard}",
        *memory_table(memory_of_ranks(config, work)),
        *waiting_lines(config, work),
    ]


def memory_table(ranks: Sequence[Memory]) -> List[str]:
    parts = [part for part in MEMORY_PARTS if any(getattr(memory, part) for memory in ranks)]
    rows = [["process", "blocks", "parameters", *parts, "together"]]
    for number, memory in enumerate(ranks):
        sizes = [f"{size / 1e9:.2f}" for size in (*(getattr(memory, part) for part in parts), memory.total)]
        rows.append([str(number), memory.blocks, f"{memory.held.together / 1e6:.1f} M", *sizes])
    return [
        "  memory of each process of a copy where a backward pass begins, in GB, by formula:",
        *table(rows, left=("blocks",)),
        "  Not counted: the CUDA context, buffers of reductions, what the allocator cannot use.",
    ]


def waiting_lines(config: Config, work: Workload) -> List[str]:
    """What is sent, and the pipeline's bubble."""
    parallel, lines = config.parallel, []
    if parallel.pipeline > 1:
        stages, m = parallel.stages_per_process, round_of(work, parallel.pipeline)
        share, kind = bubble(parallel.pipeline, stages, m), "interleaved 1F1B" if stages > 1 else "1F1B"
        terms = f"{parallel.pipeline - 1} / ({stages} x {m} + {parallel.pipeline - 1})"
        lines.append(f"  bubble ({kind}, {m} micro-batches a round): a process waits {terms} = {percent(share, 1)}")
        sent = value_bytes(work.precision) * work.tokens * config.model.hidden_size / 1e6
        lines.append(f"  sent from stage to stage in each pass of a micro-batch: {sent:.1f} MB")
    if work.copies > 1:
        held = max(memory.held for memory in memory_of_ranks(config, work))
        sent = bytes_sent(held, parallel.shard, work.copies, work.precision, work.micro_batches)
        lines.append(f"  sent to other copies in a step: {sent / 1e9:.2f} GB by each process, as much received")
    return lines
