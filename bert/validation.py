"""Checks of a config across its fields. Bounds of single numbers are in their types (config.py)."""

import functools
import json
from operator import attrgetter

from bert.config import Config
from bert.schedules import SCHEDULES
from data.errors import InputError
from ops.ipu import MATMULS

__all__ = ["asks_for_cuda", "asks_for_ipu", "has_examples", "validate", "validate_for_ipu"]

EXAMPLE_TASKS = ("classification", "token_classification", "question_answering", "multiple_choice")


def asks_for_ipu(config: Config) -> bool:
    """Whether the config is for IPUs, whatever devices are there."""
    return config.device == "ipu" or config.compile_only or config.ipu_model


def has_examples(config: Config) -> bool:
    """Whether the task is one of those that learn from labelled files."""
    return config.task.name in EXAMPLE_TASKS


def asks_for_cuda(config: Config) -> bool:
    """Whether the config is for a CUDA card, whatever devices are there."""
    return config.device == "cuda"


def validate(config: Config, source: str = "config") -> None:
    """Raises InputError for the first impossible value: names `source`, the key, its value and what is expected."""
    expect = functools.partial(_expect, config, source)
    model, data, optimizer = config.model, config.data, config.optimizer
    heads, longest, most_masked = model.num_attention_heads, model.max_position_embeddings, data.sequence_length - 3
    expect(model.hidden_size % heads == 0, "model.hidden_size", f"a multiple of model.num_attention_heads, {heads}")
    at_most = f"at most model.max_position_embeddings, {longest}"
    expect(data.sequence_length <= longest, "data.sequence_length", at_most)
    at_most = f"at most data.sequence_length less [CLS] and two [SEP], {most_masked}"
    expect(data.mask_tokens <= most_masked or has_examples(config), "data.mask_tokens", at_most)
    if data.text:
        either = "above 0 where data.held_out_files says where the held-out shards go, 0 where it is empty"
        expect((data.held_out > 0) == bool(data.held_out_files), "data.held_out", either)
    expect(len(optimizer.betas) == 2, "optimizer.betas", "two numbers, each at least 0 and below 1")
    expect(optimizer.schedule in SCHEDULES, "optimizer.schedule", f"one of {', '.join(SCHEDULES)}")
    if optimizer.schedule == "wsd":
        left = f"at most what optimizer.warmup_ratio, {optimizer.warmup_ratio}, leaves of 1"
        both = round(optimizer.warmup_ratio + optimizer.decay_ratio, 9)  # 0.7 + 0.2 + 0.1 is not 1 in floating point
        expect(both <= 1, "optimizer.decay_ratio", left)
    if optimizer.trust_ratio_slices > 1:
        lamb = f'1 where optimizer.name is {json.dumps(optimizer.name)}: trust ratios are "lamb"\'s'
        expect(optimizer.name == "lamb", "optimizer.trust_ratio_slices", lamb)
        divides = f"a number that divides model.vocab_size, {model.vocab_size}: {divisors_of(model.vocab_size)}"
        expect(model.vocab_size % optimizer.trust_ratio_slices == 0, "optimizer.trust_ratio_slices", divides)
    pre_training = "false where the task learns from labelled files: pre-training is what it plans"
    expect(not (config.plan and has_examples(config)), "plan", pre_training)
    most, columns = {
        "token_classification": (1, "one column, that of the words"),
        "question_answering": (0, "none, as files of question_answering have SQuAD's"),
        "multiple_choice": (config.task.choices + 2, "a context, maybe what all endings begin with, and the endings"),
    }.get(config.task.name, (2, "one column, or the two of a pair"))
    expect(len(config.task.text_columns) <= most, "task.text_columns", columns)
    expect(len(set(config.task.labels)) == len(config.task.labels) != 1, "task.labels", "different labels, two or more")
    expect(config.task.choices > 1, "task.choices", "two or more endings")
    shortest = 5  # [CLS] and two [SEP] around a token each
    expect(data.sequence_length >= shortest or not has_examples(config), "data.sequence_length", f"at least {shortest}")
    training = config.training
    if training.evaluate_every:
        expect(bool(data.held_out_files), "data.held_out_files", "shards, as training.evaluate_every is set")
    if training.epochs:
        steps = '"auto", "samples" or "off" where training.epochs is set: how many samples rows hold is not known'
        expect(data.packing != "rows", "data.packing", steps)
    if training.patience:
        expect(bool(data.held_out_files), "data.held_out_files", "files, as training.patience is set")
        when = "null without training.evaluate_every or training.epochs, which say when evaluations are"
        expect(bool(training.evaluate_every or training.epochs), "training.patience", when)
    if training.branch_from:
        either = "null where training.branch_from is set, which has weights"
        expect(training.start_from is None, "training.start_from", either)
        expect(training.epochs is None, "training.epochs", "null where training.branch_from is set: give max_steps")
    if training.precision == "float8":
        for key in ("model.hidden_size", "model.intermediate_size", "data.sequence_length"):
            expect(attrgetter(key)(config) % 16 == 0, key, "a multiple of 16, as training.precision is float8")
    if asks_for_ipu(config):
        validate_for_ipu(config, source)


def validate_for_ipu(config: Config, source: str = "config") -> None:
    """The same for the ipu section, and what else only IPUs ask for: static shapes, whole parts, what PopTorch has."""
    expect = functools.partial(_expect, config, source)
    training, ipu, vocabulary = config.training, config.ipu, config.model.vocab_size
    simulator = "false with --compile-only: the simulator's executables are not kept"
    expect(not (config.compile_only and config.ipu_model), "ipu_model", simulator)
    expect(config.device in ("auto", "ipu"), "device", '"ipu" or "auto" with --compile-only and --ipu-model')
    check_placement(config, source)
    rows, accumulation, replicas = ipu.micro_batch_size, ipu.gradient_accumulation_steps, ipu.replication_factor
    batch = rows * accumulation * replicas
    product = "ipu.micro_batch_size x gradient_accumulation_steps x replication_factor"
    numbers = f"{rows} x {accumulation} x {replicas} = {batch}"
    expect(batch == training.global_batch_size, "training.global_batch_size", f"{product} = {numbers}")
    divisor = f"a divisor of ipu.replication_factor, {replicas}; without poprun: --ipu.instances 1"
    expect(replicas % ipu.instances == 0, "ipu.instances", divisor)
    packings = '"rows", "off" or "auto" on IPUs, whose shapes are static'
    expect(config.data.packing != "samples", "data.packing", packings)
    expect(training.precision in ("auto", "float32"), "training.precision", '"auto" (float16) or "float32" on IPUs')
    parts = ipu.embedding_serialization_factor or 1
    padded = f"a vocabulary padded by unused tokens: --model.vocab_size {-(-vocabulary // parts) * parts}"
    divides = f"a number that divides model.vocab_size, {vocabulary}: {divisors_of(vocabulary)}. Or begin with {padded}"
    expect(vocabulary % parts == 0, "ipu.embedding_serialization_factor", divides)
    slices = parts if accumulation > 1 else 1  # without accumulation the decoder's update is not cut
    either = f"1 or {slices}, the parts of the decoder's update on IPUs" if slices > 1 else "1, as one part is updated"
    expect(config.optimizer.trust_ratio_slices in (1, slices), "optimizer.trust_ratio_slices", either)
    stages = 2 * len(ipu.layers_per_ipu) + 1 if len(ipu.layers_per_ipu) > 1 else 1
    filled = f"at least {stages}, the stages of the pipeline forward and backward"
    expect(accumulation >= stages, "ipu.gradient_accumulation_steps", filled)
    optimizers = '"lamb" or "adamw", which PopTorch has, or another device: --device cuda or --device cpu'
    expect(config.optimizer.name in ("lamb", "adamw"), "optimizer.name", optimizers)
    unclipped = "0 on IPUs: PopART would clip gradients that still have the loss scaling"
    expect(not config.optimizer.max_grad_norm, "optimizer.max_grad_norm", unclipped)
    if training.precision == "float32":
        scaling = 'false where training.precision is "float32"'
        expect(not ipu.automatic_loss_scaling, "ipu.automatic_loss_scaling", scaling)
    expect(
        training.evaluate_every is None,
        "training.evaluate_every",
        "null on IPUs: between two steps they cannot go to another executable and back without drawing the dropout of "
        "the first steps again. At the end of a run they evaluate, and python -m bert.evaluate does any checkpoint",
    )
    expect(training.patience is None, "training.patience", "null on IPUs, which evaluate at the end of a run alone")
    counted = () if training.epochs else ("max_steps",)
    for name in (*counted, "stop_at_step", "save_every", "log_every"):
        whole_calls = (getattr(training, name) or 0) % ipu.device_iterations == 0
        expect(whole_calls, f"training.{name}", f"a multiple of ipu.device_iterations, {ipu.device_iterations}")


def check_placement(config: Config, source: str) -> None:
    """The same for where layers are, and for the shares of memory there."""
    expect = functools.partial(_expect, config, source)
    ipu, ipus, layers = config.ipu, len(config.ipu.layers_per_ipu), config.model.num_hidden_layers
    if isinstance(ipu.matmul_proportion, list):
        each = f"one number, or one for each of the {ipus} IPUs of ipu.layers_per_ipu"
        expect(len(ipu.matmul_proportion) == ipus, "ipu.matmul_proportion", each)
    split = f"counts that add up to model.num_hidden_layers, {layers}, such as [0, {layers}]"
    expect(sum(ipu.layers_per_ipu) == layers, "ipu.layers_per_ipu", split)
    expect(all(ipu.layers_per_ipu[1:]), "ipu.layers_per_ipu", "at least one layer on each IPU but the first")
    products = f"shares above 0, at most 1, for some of {', '.join(MATMULS)}"
    expect(set(ipu.operation_proportions) <= set(MATMULS), "ipu.operation_proportions", products)


def divisors_of(vocabulary: int) -> str:
    return ", ".join(str(number) for number in range(1, 33) if vocabulary % number == 0)


def _expect(config: Config, source: str, good: bool, key: str, expected: str) -> None:
    if not good:
        raise InputError(f"{source}: {key} is {json.dumps(attrgetter(key)(config))}, expected {expected}")
