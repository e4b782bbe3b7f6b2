"""What a plan for IPUs warns of, and the settings that would help. A setting is named only after a plan with it has
shown that it does."""

import json
from typing import Any, Dict, Iterator, List

from bert.config import Config
from bert.plan.ipu_plan import IPU_BYTES, MIB, IpuPlan, make_ipu_plan, with_settings
from bert.text import percent

__all__ = ["warnings_of"]

TIGHT, UNBALANCED, BUBBLE, LARGE_LOGITS = 0.9, 1.1, 0.05, 0.02
LOW_PROPORTION = 0.1  # below it, products are cut so small that they get slow
WORTH_NAMING = 0.02  # less work for the slowest IPU


def warnings_of(config: Config, plan: IpuPlan) -> List[str]:
    """In lines, worst first; none if all is well. Indented lines belong to the one before them."""
    return [*memory_warnings(config, plan), *pipeline_warnings(config, plan), *product_warnings(config, plan)]


def memory_warnings(config: Config, plan: IpuPlan) -> Iterator[str]:
    shares = {ipu: memory.total / IPU_BYTES for ipu, memory in enumerate(plan.memory)}
    over = [f"IPU {ipu} needs {mib(share)}" for ipu, share in shares.items() if share > 1]
    tight = [f"IPU {ipu} is {percent(share)}" for ipu, share in shares.items() if TIGHT < share <= 1]
    if over:
        needs = f"{', '.join(over)} of {mib(1)} MiB"
        yield f"does not fit: {needs}. Settings that help, and what the fullest IPU then needs:"
        yield from (f"  {line}" for line in what_helps(config, plan))
    if tight:
        yield f"tight: {', '.join(tight)} full, and program code and exchange buffers come on top"


def pipeline_warnings(config: Config, plan: IpuPlan) -> Iterator[str]:
    works = [plan.work_of(ipu) for ipu, layers in enumerate(config.ipu.layers_per_ipu) if layers]
    imbalance, bubble = plan.slowest_work * len(works) / sum(works), plan.filling / plan.cycles
    if imbalance > UNBALANCED:
        excess = f"whose work is {percent(imbalance - 1)} above the mean of the IPUs with layers"
        yield f"unbalanced: all wait for IPU {plan.slowest}, {excess}{better_balance(config, plan)}"
    if bubble > BUBBLE:
        yield (
            f"bubble: filling and draining the pipeline is {percent(bubble, 1)} of a step. More micro-batches make it "
            "less: a higher ipu.gradient_accumulation_steps, with a lower ipu.micro_batch_size or fewer replicas for "
            "the same global batch"
        )


def product_warnings(config: Config, plan: IpuPlan) -> Iterator[str]:
    if not config.ipu.enable_half_partials and config.training.precision != "float32":
        yield "partial sums: the estimate is for float16 ones, and ipu.enable_half_partials is false: it will be slower"
    traced, key = plan.trace, "ipu.embedding_serialization_factor"
    # The decoder is the last product with the vocabulary.
    decoders = [operation for operation in traced.operations if operation.product[-1] == config.model.vocab_size]
    logits = sum(traced.values[i].bytes for decoder in decoders[-1:] for i in decoder.outputs)
    if config.ipu.embedding_serialization_factor is None and logits > LARGE_LOGITS * IPU_BYTES:
        remedy = f"No number up to 100 divides model.vocab_size for {key}: pad the vocabulary"
        if next_factor(config):
            remedy = f"Set {key}, for example to {next_factor(config)}"
        yield f"factor missing: the decoder runs in one part, with logits of {logits / MIB:.0f} MiB. {remedy}"


def better_balance(config: Config, plan: IpuPlan) -> str:
    """What evenly spread layers would gain; empty if that is next to nothing."""
    ipus, layers = len(config.ipu.layers_per_ipu), config.model.num_hidden_layers
    even = [layers // ipus + (ipu >= ipus - layers % ipus) for ipu in range(ipus)]
    other = make_ipu_plan(with_settings(config, {"ipu.layers_per_ipu": even}))
    gain = 1 - other.slowest_work / plan.slowest_work
    if gain < WORTH_NAMING:
        return ""
    full = f"and the fullest IPU would be {percent(other.fullest_share)} full"
    return f". ipu.layers_per_ipu {json.dumps(even)}: {percent(gain)} less work for the slowest, {full}"


def what_helps(config: Config, plan: IpuPlan) -> Iterator[str]:
    """Single settings that make the fullest IPU less full, those that cost little speed first. If none is enough, all
    together."""
    together: Dict[str, Any] = {}
    enough = False
    for settings in remedies(config):
        together.update(settings)
        share = make_ipu_plan(with_settings(config, settings)).fullest_share
        if share < plan.fullest_share - 0.005:
            names = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
            yield f"{names}: {mib(share)} MiB{'' if share <= 1 else ', still too much'}"
            enough |= share <= 1
            if share <= 1 and "ipu.micro_batch_size" in settings:
                break  # the next are smaller still
    if not enough:
        share = make_ipu_plan(with_settings(config, together)).fullest_share
        more = ", still too much. More IPUs with fewer layers each: ipu.layers_per_ipu" if share > 1 else ""
        yield f"all of these together: {mib(share)} MiB{more}"


def remedies(config: Config) -> Iterator[Dict[str, Any]]:
    """Settings that need less memory, with others that go with them."""
    ipu, factor, is_half = config.ipu, next_factor(config), config.training.precision != "float32"
    shares = ipu.matmul_proportion if isinstance(ipu.matmul_proportion, list) else [ipu.matmul_proportion]
    lower = [round(min(share, max(LOW_PROPORTION, share / 2)), 3) for share in shares]
    candidates = {
        "training.precision": not is_half and "auto",
        "ipu.replicated_tensor_sharding": not ipu.replicated_tensor_sharding,
        "ipu.enable_half_first_order_momentum": not ipu.enable_half_first_order_momentum and is_half,
        "ipu.matmul_proportion": lower != shares and (lower if shares is ipu.matmul_proportion else lower[0]),
        "ipu.embedding_serialization_factor": factor,
        "ipu.recompute_checkpoint_every_layer": not ipu.recompute_checkpoint_every_layer,
        "ipu.optimizer_state_offchip": not ipu.optimizer_state_offchip,
    }
    yield from ({key: value} for key, value in candidates.items() if value)
    micro_batch, accumulation = ipu.micro_batch_size, ipu.gradient_accumulation_steps
    while micro_batch % 2 == 0:
        micro_batch, accumulation = micro_batch // 2, accumulation * 2
        yield {"ipu.micro_batch_size": micro_batch, "ipu.gradient_accumulation_steps": accumulation}


def mib(share: float) -> str:
    """Of an IPU's memory."""
    return f"{share * IPU_BYTES / MIB:.0f}"


def next_factor(config: Config) -> int:
    """The next larger number of parts that divides the vocabulary; 0 if there is none below 100."""
    now, tokens = config.ipu.embedding_serialization_factor or 1, config.model.vocab_size
    return next((factor for factor in range(now + 1, 100) if tokens % factor == 0), 0)
