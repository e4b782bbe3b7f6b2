"""What a plan for IPUs warns of, and which settings change it: each remedy is tried before it is named."""

import copy
import json
from typing import Any, Dict, Iterator, List

from bert.config import Config
from bert.ipu_plan import IPU_BYTES, IpuPlan, make_ipu_plan

__all__ = ["warnings_of"]

MIB = 2 ** 20
TIGHT, UNBALANCED, BUBBLE = 0.9, 1.1, 0.05
LOW_PROPORTION = 0.1  # below it, products are cut so small that they get slow


def warnings_of(config: Config, found: IpuPlan) -> List[str]:
    """One line each, worst first; none where all is well."""
    lines, ipu = [], config.ipu
    full = [one.total / IPU_BYTES for one in found.memory]
    over = [i for i, share in enumerate(full) if share > 1]
    if over:
        lines.append("does not fit: %s of %d MiB. What helps, the fullest IPU with it:" % (
            ", ".join("IPU %d needs %.0f" % (i, found.memory[i].total / MIB) for i in over), IPU_BYTES / MIB))
        lines += ["  " + line for line in what_helps(config, max(full))]
    tight = [i for i, share in enumerate(full) if TIGHT < share <= 1]
    if tight:
        lines.append("tight: %s full, and program code and exchange buffers come on top" % ", ".join(
            "IPU %d is %.0f %%" % (i, 100 * full[i]) for i in tight))
    works = [found.work_of(i) for i, layers in enumerate(ipu.layers_per_ipu) if layers]
    excess = found.work_of(found.slowest) * len(works) / sum(works)
    if excess > UNBALANCED:
        lines.append("unbalanced: all wait for IPU %d, whose work is %.0f %% above the mean of the IPUs with layers. Where memory allows, "
                     "move layers off it: ipu.layers_per_ipu" % (found.slowest, 100 * (excess - 1)))
    if found.filling > BUBBLE * found.cycles:
        lines.append("bubble: filling and draining the pipeline is %.1f %% of a step. More micro-batches make it less: "
                     "ipu.gradient_accumulation_steps" % (100 * found.filling / found.cycles))
    head = found.stages[-1].stage.ipu
    if ipu.embedding_serialization_factor is None and found.memory[head].moment == "mlm_decoder of heads":
        factor = next_factor(config)
        lines.append("factor missing: the MLM decoder runs in one part, and is the fullest moment of IPU %d. %s" % (
            head, "Set ipu.embedding_serialization_factor, for example to %d" % factor if factor else
            "No number up to 100 divides model.vocab_size for ipu.embedding_serialization_factor: pad the vocabulary"))
    return lines


def what_helps(config: Config, fullest: float) -> Iterator[str]:
    """Single settings that make the fullest IPU less full than `fullest`, a share of its memory; those that cost little speed first."""
    enough = False
    for settings in remedies(config):
        changed = copy.deepcopy(config)
        for name, value in settings.items():
            setattr(changed.ipu, name, value)
        share = max(one.total for one in make_ipu_plan(changed).memory) / IPU_BYTES
        if share < fullest - 0.005:
            enough |= share <= 1
            yield "%s: %.0f MiB%s" % (", ".join("ipu.%s %s" % (name, json.dumps(value)) for name, value in settings.items()),
                                      share * IPU_BYTES / MIB, "" if share <= 1 else ", not enough alone")
    if not enough:
        yield "several of these together, or more IPUs with fewer layers each: ipu.layers_per_ipu"


def remedies(config: Config) -> Iterator[Dict[str, Any]]:
    """Settings of the ipu section, and what goes with them."""
    ipu, factor = config.ipu, next_factor(config)
    if not ipu.replicated_tensor_sharding and ipu.replication_factor > 1:
        yield {"replicated_tensor_sharding": True}
    if not ipu.enable_half_first_order_momentum:
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
    if ipu.micro_batch_size % 2 == 0:
        yield {"micro_batch_size": ipu.micro_batch_size // 2, "gradient_accumulation_steps": ipu.gradient_accumulation_steps * 2}


def next_factor(config: Config) -> int:
    """The next larger number of parts that divides the vocabulary; 0 where there is none below 100."""
    now, words = config.ipu.embedding_serialization_factor or 1, config.model.vocab_size
    return next((factor for factor in range(now + 1, 100) if words % factor == 0), 0)
