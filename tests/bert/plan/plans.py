"""Plans of the recipe's configs, changed by options: `plan_of("pod16_phase1", "--ipu.micro_batch_size 4")`."""

import functools

from bert.command_line import parse_command_line
from bert.plan.ipu_plan import make_ipu_plan

SMALL = (
    "--model.vocab_size 1000 --model.hidden_size 64 --model.num_hidden_layers 5 --model.num_attention_heads 2 "
    "--model.intermediate_size 160 --model.max_position_embeddings 64 --data.sequence_length 48 --data.mask_tokens 9 "
    "--ipu.layers_per_ipu [1,2,2]"
)


@functools.lru_cache(maxsize=None)
def config_of(name, options=""):
    return parse_command_line(["--config", name, *options.split()])


@functools.lru_cache(maxsize=None)
def plan_of(name, options=""):
    return make_ipu_plan(config_of(name, options))
