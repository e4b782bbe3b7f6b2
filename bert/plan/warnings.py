"""What a plan for IPUs warns of, and which settings change it: what is to make it fit, or to balance it, is tried
before it is named."""

import copy
import json
from typing import Any, Dict, Iterator, List

from bert.config import Config, samples_per_row
from bert.plan.ipu_plan import IPU_BYTES, IpuPlan, make_ipu_plan
from data.rows import RowShape

__all__ = ["warnings_of"]

MIB = 2**20
TIGHT, UNBALANCED, BUBBLE, LARGE_LOGITS = 0.9, 1.1, 0.05, 0.02
LOW_PROPORTION = 0.1  # below it, products are cut so small that they get slow


def warnings_of(config: Config, found: IpuPlan) -> List[str]:
    """One line each, worst first; none where all is well."""
    lines, ipu = [], config.ipu
    full = [one.total / IPU_BYTES for one in found.memory]
    over = [i for i, share in enumerate(full) if share > 1]
    if over:
        lines.append(
            "does not fit: %s of %d MiB. Settings that help, and what the fullest IPU then needs:"
            % (", ".join("IPU %d needs %.0f" % (i, found.memory[i].total / MIB) for i in over), IPU_BYTES / MIB)
        )
        lines += ["  " + line for line in what_helps(config, found)]
    tight = [i for i, share in enumerate(full) if TIGHT < share <= 1]
    if tight:
        lines.append(
            "tight: %s full, and program code and exchange buffers come on top"
            % ", ".join("IPU %d is %.0f %%" % (i, 100 * full[i]) for i in tight)
        )
    works = [found.work_of(i) for i, layers in enumerate(ipu.layers_per_ipu) if layers]
    excess = found.work_of(found.slowest) * len(works) / sum(works)
    if excess > UNBALANCED:
        lines.append(
            f"unbalanced: all wait for IPU {found.slowest}, whose work is {100 * (excess - 1):.0f} % above "
            f"the mean of the IPUs with layers{better_balance(config, found)}"
        )
    if found.filling > BUBBLE * found.cycles:
        lines.append(
            f"bubble: filling and draining the pipeline is {100 * found.filling / found.cycles:.1f} % of a "
            "step. More micro-batches make it less: a higher ipu.gradient_accumulation_steps, with a lower "
            "ipu.micro_batch_size or fewer replicas for the same global batch"
        )
    if not ipu.enable_half_partials and config.training.precision != "float32":
        lines.append(
            "partial sums: the estimate is for float16 ones, and ipu.enable_half_partials is false: it will be slower"
        )
    logits = logits_of(config)
    if ipu.embedding_serialization_factor is None and logits > LARGE_LOGITS * IPU_BYTES:
        factor = next_factor(config)
        lines.append(
            "factor missing: the MLM decoder runs in one part, with logits of %.0f MiB. %s"
            % (
                logits / MIB,
                "Set ipu.embedding_serialization_factor, for example to %d" % factor
                if factor
                else (
                    "No number up to 100 divides model.vocab_size for ipu.embedding_serialization_factor: pad "
                    "the vocabulary"
                ),
            )
        )
    return lines


def logits_of(config: Config) -> int:
    """Bytes of the MLM logits of a micro-batch."""
    data = config.data
    slots = RowShape.of(data.sequence_length, data.mask_tokens, samples_per_row(config, "ipu")).mask_slots
    return (
        config.ipu.micro_batch_size
        * slots
        * config.model.vocab_size
        * (4 if config.training.precision == "float32" else 2)
    )


def better_balance(config: Config, found: IpuPlan) -> str:
    """What the layers spread evenly would gain; empty where that is nothing."""
    even = copy.deepcopy(config)
    ipus, layers = len(config.ipu.layers_per_ipu), config.model.num_hidden_layers
    even.ipu.layers_per_ipu = [layers // ipus + (i >= ipus - layers % ipus) for i in range(ipus)]
    other = make_ipu_plan(even)
    gain = 1 - other.work_of(other.slowest) / found.work_of(found.slowest)
    if gain < 0.02:
        return ""
    return (
        f". ipu.layers_per_ipu {json.dumps(even.ipu.layers_per_ipu)}: {100 * gain:.0f} % less work for the "
        f"slowest, and the fullest IPU would be {100 * other.fullest:.0f} % full"
    )


def what_helps(config: Config, found: IpuPlan) -> Iterator[str]:
    """Single settings that make the fullest IPU less full, those that cost little speed first; where none is enough,
    all together."""
    together, enough = copy.deepcopy(config), False
    for settings in remedies(config):
        changed = copy.deepcopy(config)
        for one in (changed, together):
            for name, value in settings.items():
                section, key = name.split(".")
                setattr(getattr(one, section), key, value)
        share = make_ipu_plan(changed).fullest
        if share < found.fullest - 0.005:
            enough |= share <= 1
            yield "%s: %.0f MiB%s" % (
                ", ".join("%s %s" % (name, json.dumps(value)) for name, value in settings.items()),
                share * IPU_BYTES / MIB,
                "" if share <= 1 else ", still too much",
            )
            if share <= 1 and "ipu.micro_batch_size" in settings:
                break  # the next are smaller still
    if not enough:
        share = make_ipu_plan(together).fullest
        yield (
            f"all of these together: {share * IPU_BYTES / MIB:.0f} "
            f"MiB{'' if share <= 1 else ', still too much. More IPUs with fewer layers each: ipu.layers_per_ipu'}"
        )


def remedies(config: Config) -> Iterator[Dict[str, Any]]:
    """Settings, and what goes with them."""
    for section, settings in (("training", precision_remedies(config)), ("ipu", ipu_remedies(config))):
        for one in settings:
            yield {f"{section}.{name}": value for name, value in one.items()}


def precision_remedies(config: Config) -> Iterator[Dict[str, Any]]:
    if config.training.precision == "float32":
        yield {"precision": "auto"}


def ipu_remedies(config: Config) -> Iterator[Dict[str, Any]]:
    ipu, factor = config.ipu, next_factor(config)
    if not ipu.replicated_tensor_sharding and ipu.replication_factor > 1:
        yield {"replicated_tensor_sharding": True}
    if not ipu.enable_half_first_order_momentum and config.training.precision != "float32":
        yield {"enable_half_first_order_momentum": True}
    shares = ipu.matmul_proportion if isinstance(ipu.matmul_proportion, list) else [ipu.matmul_proportion]
    lower = [round(min(share, max(LOW_PROPORTION, share / 2)), 3) for share in shares]
    if lower != shares:
        yield {"matmul_proportion": lower if isinstance(ipu.matmul_proportion, list) else lower[0]}
    if factor:
        yield {"embedding_serialization_factor": factor}
    if not ipu.recompute_checkpoint_every_layer:
        yield {"recompute_checkpoint_every_layer": True}
    if not ipu.optimizer_state_offchip:
        yield {"optimizer_state_offchip": True}
    micro_batch, accumulation = ipu.micro_batch_size, ipu.gradient_accumulation_steps
    while micro_batch % 2 == 0:
        micro_batch, accumulation = micro_batch // 2, accumulation * 2
        yield {"micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}


def next_factor(config: Config) -> int:
    """The next larger number of parts that divides the vocabulary; 0 where there is none below 100."""
    now, words = config.ipu.embedding_serialization_factor or 1, config.model.vocab_size
    return next((factor for factor in range(now + 1, 100) if words % factor == 0), 0)
