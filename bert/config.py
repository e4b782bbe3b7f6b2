"""The configuration of a run: dataclasses in, JSON files, dotted overrides on the command line."""

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Optional, Sequence, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from data.errors import InputError
from data.packing import SAMPLES_PER_ROW
from ops.ipu import MATMULS

__all__ = [
    "Config",
    "DataConfig",
    "IpuConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TaskConfig",
    "TrainingConfig",
    "parse_command_line",
    "samples_per_row",
    "validate",
    "validate_for_ipu",
]

CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


@dataclass
class ModelConfig:
    """The BERT encoder, in the terms of a transformers config.json."""

    vocab_size: int = 30522
    """Words of the vocabulary."""
    hidden_size: int = 768
    """Size of a token's vector."""
    num_hidden_layers: int = 12
    """Encoder layers."""
    num_attention_heads: int = 12
    """Attention heads of a layer; they divide hidden_size."""
    intermediate_size: int = 3072
    """Size of the feed-forward layer."""
    max_position_embeddings: int = 512
    """The longest sequence that the position embedding has room for."""
    type_vocab_size: int = 2
    """Kinds of segments."""
    hidden_dropout_prob: float = 0.1
    """Dropout of embeddings, attention outputs and feed-forward outputs."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout of attention weights."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every LayerNorm; the recipe uses 1e-3."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights, a normal cut off at two of them."""


@dataclass
class DataConfig:
    """The data set: shards, or text to make them from."""

    files: Union[str, List[str]] = field(default_factory=list)
    """Training shards: a path or glob, or a list of them. `python -m data.prepare` makes them from text."""
    held_out_files: Union[str, List[str]] = field(default_factory=list)
    """Shards that the model is evaluated on at the end of the run; none: no evaluation."""
    vocab: Optional[str] = None
    """The vocabulary that the shards were made with (vocab.txt); by default the one beside the first shard."""
    sequence_length: int = 128
    """Tokens of a sample, at most."""
    mask_tokens: int = 20
    """Masked tokens of a sample, at most."""
    packing: Literal["auto", "samples", "rows", "off"] = "auto"
    """How samples share rows. samples: a global batch is exactly global_batch_size samples, in as few rows as they fit;
    rows: it is that many rows, static shapes, with as many samples as fit; off: one sample a row. auto: samples on CPU
    and CUDA, off on IPUs, whose shapes are static: the same global batches."""
    samples_per_row: int = SAMPLES_PER_ROW
    """Samples of a packed row, at most."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What to do with a shard that is missing, cut off or holds a bad sample: stop the run, or leave it out and report
    it."""
    workers: int = 2
    """Threads of the loader's process; no more than the machine has cores."""
    text: Union[str, List[str]] = field(default_factory=list)
    """Where `files` are not there yet, make them from this text: paths or globs, or `python`, the prose that Python
    brings. They go into the folder of `files`, which must be named train-*.h5."""
    text_format: Literal["lines", "wikitext", "wikiextractor", "jsonl"] = "lines"
    """How `text` separates documents: blank lines, `= Title =` lines, WikiExtractor's <doc>, or one JSON object a
    line."""
    duplicates: int = 1
    """How often each document of `text` is cut and masked anew."""
    held_out: float = 0.0
    """Share of the documents of `text` that is kept apart as held_out-*.h5."""


@dataclass
class TaskConfig:
    """What the model learns."""

    name: Literal["pretraining"] = "pretraining"
    """pretraining: BERT's own two tasks, MLM and NSP."""
    nsp: bool = True
    """Whether NSP is learned beside MLM; without it the model has no NSP head. `data.prepare --nsp false` makes samples
    of one segment."""


@dataclass
class OptimizerConfig:
    """The optimizer, and the schedule of its learning rate: a linear warm-up to the peak, then `schedule`."""

    name: Literal["lamb", "adamw", "muon"] = "lamb"
    """lamb: LAMB without bias correction, the recipe's; adamw; muon: Muon for the encoder's matrices, AdamW for the
    rest."""
    learning_rate: float = 0.006
    """The peak."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """After the warm-up. linear: down to 0 after the last step; cosine: the same along half a cosine; wsd: the peak,
    then linear over the last `decay_ratio` of all steps; constant: the peak."""
    warmup_ratio: float = 0.28
    """Share of all steps until the peak, rounded up to whole steps."""
    decay_ratio: float = 0.1
    """Share of all steps, the last ones, in which the schedule wsd goes down."""
    betas: List[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decay of matrices and embeddings; biases and LayerNorms have none."""


@dataclass
class TrainingConfig:
    """The run."""

    global_batch_size: int = 65536
    """Samples of one optimizer step."""
    max_steps: int = 10500
    """Optimizer steps of the whole schedule."""
    stop_at_step: Optional[int] = None
    """Stop here, with a checkpoint, and leave the schedule as it is: for a time slot that is shorter than the run."""
    micro_batch_size: Optional[int] = None
    """Rows of one forward pass on CPU and CUDA; by default what suits the device. It changes speed and memory, not the
    gradient."""
    seed: int = 42
    """Of the initial weights, the order of samples, and dropout."""
    start_from: Optional[str] = None
    """Folder with the weights to start from: a checkpoint of this project, or any BERT of transformers saved as
    safetensors."""
    output: Optional[str] = None
    """The run's folder; by default runs/ and the config's name."""
    precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """Of matrix products; auto: bfloat16 on a CUDA card that has it, float16 on IPUs, else float32. float8: bfloat16,
    with the encoder's linear layers in float8, scaled tensor by tensor: fast on CUDA cards of compute capability 8.9 or
    newer, slow on the CPU. Weights stay in float32, but for IPUs in float16, where they are rounded stochastically."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each encoder layer; auto: on CUDA where Triton is found, not on the CPU, where it gains
    nothing."""
    log_every: int = 5
    """Steps between two lines of metrics."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""


@dataclass
class IpuConfig:
    """The pipeline on IPUs: placement, static batch geometry, memory. On CUDA and CPU only
    embedding_serialization_factor counts."""

    layers_per_ipu: List[int] = field(default_factory=lambda: [0, 4, 4, 4])
    """Encoder layers on each IPU of a replica; embeddings and heads are on IPU 0."""
    replication_factor: int = 4
    """Replicas: copies of the whole pipeline."""
    micro_batch_size: int = 32
    """Rows of one forward pass of one replica."""
    gradient_accumulation_steps: int = 512
    """Micro-batches of one replica in one optimizer step."""
    device_iterations: int = 1
    """Optimizer steps in one call of the executable, all with the learning rate of the last one."""
    embedding_serialization_factor: Optional[int] = None
    """In how many parts the MLM decoder and its loss are computed, so that full logits never exist at once; by default
    1 on IPUs, and on CUDA and CPU as many as keep a part's logits small. On IPUs it cuts the vocabulary, and must
    divide model.vocab_size."""
    matmul_proportion: Union[float, List[float]] = 0.25
    """Share of an IPU's memory that a matrix product may take for temporaries: one for all IPUs, or one each."""
    operation_proportions: Dict[str, float] = field(default_factory=dict)
    """The same for single products, by name: query_key_value, attention_scores, attention_context, attention_output,
    intermediate, output, select_tokens, mlm_transform, mlm_decoder."""
    loss_scaling: float = 16384.0
    """Keeps float16 gradients from underflow."""
    automatic_loss_scaling: bool = False
    """Adjust the loss scaling as gradients grow and shrink, from loss_scaling on."""
    stochastic_rounding: bool = True
    """Round float16 values up or down by chance, so that small updates of weights are not lost."""
    recompute_checkpoint_every_layer: bool = True
    """Keep each layer's input for the backward pass and recompute what follows it."""
    replicated_tensor_sharding: bool = True
    """Split the optimizer's state over the replicas."""
    optimizer_state_offchip: bool = False
    """Keep the optimizer's state in the host's memory."""
    enable_half_partials: bool = True
    """Partial sums of matrix products in float16."""
    enable_half_first_order_momentum: bool = True
    """LAMB's first moment in float16."""
    executable_cache_dir: str = "./exe_cache"
    """Compiled executables are kept here."""
    synthetic_data: bool = False
    """Let the IPUs make up their input, to measure them without the host."""
    profile_folder: Optional[str] = None
    """Where to put a profile for PopVision, also of a model that does not fit."""


@dataclass
class Config:
    """BERT pre-training: config -> shards -> global batches -> LAMB -> checkpoint that transformers loads."""

    device: Literal["auto", "ipu", "cuda", "cpu"] = "auto"
    """Where to train; auto: IPUs where PopTorch finds some, else CUDA where there is a device, else the CPU."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the run in the output folder, where there is one, exactly where its newest checkpoint is."""
    plan: bool = False
    """`--plan`: do not train, say what would run where, how full each IPU gets and how long the run takes, and draw it.
    For device ipu, and for auto where the ipu section gives the global batch, on any machine; for cuda and cpu it
    measures a micro-batch."""
    compile_only: bool = False
    """`--compile-only`: compile the executable for IPUs into ipu.executable_cache_dir and stop; needs PopTorch, but no
    IPU."""
    ipu_model: bool = False
    """`--ipu-model`: run on Graphcore's simulator in place of IPUs, for small models."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ipu: IpuConfig = field(default_factory=IpuConfig)


FLAGS = ("plan", "compile_only", "ipu_model")
SECTIONS = {
    "model": ModelConfig,
    "task": TaskConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "ipu": IpuConfig,
}


def parse_command_line(arguments: Sequence[str]) -> Config:
    """`--config NAME_OR_PATH` and dotted overrides -> a valid Config. A bare name is looked for here, then in configs/.

    Raises InputError that names the file or the command line, the key, what was found and what is expected.
    """
    parser = make_parser()
    name = config_option(arguments)
    if name is not None:
        path = find_config(name)
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}: is not JSON: {error}")
        check_keys(values, path)
        try:
            parser.parse_object(values)
        except ArgumentError as error:
            raise InputError(f"{path}: {one_line(error)}")
        parser.set_defaults(flatten(values))
    try:
        flags = {"--" + name.replace("_", "-"): f"--{name}=true" for name in FLAGS}
        found = parser.parse_args([flags.get(argument, argument) for argument in arguments])
    except ArgumentError as error:
        hint = "Quote a pattern, so that the shell leaves it as it is; `--help` lists every option"
        raise InputError(f"command line: {one_line(error)}. {hint}")
    sections = {section: kind(**vars(getattr(found, section))) for section, kind in SECTIONS.items()}
    config = Config(**{name: getattr(found, name) for name in ("device", "resume") + FLAGS}, **sections)
    config.data = dataclasses.replace(
        config.data, **{key: as_list(getattr(config.data, key)) for key in ("files", "held_out_files", "text")}
    )
    if config.training.output is None:
        stem = os.path.splitext(os.path.basename(name))[0] if name else "run"
        config.training.output = os.path.join("runs", stem)
    validate(config, find_config(name) if name else "command line")
    return config


def make_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="run_pretraining.py",
        exit_on_error=False,
        parser_mode="json",
        allow_abbrev=False,
        description="Pre-trains BERT: MLM and NSP with LAMB, on IPUs, CUDA GPUs or the CPU, from one config.",
        epilog="Example: python run_pretraining.py --config pod16_phase1.json --data.files 'shards/train-*.h5' "
        "--training.max_steps 20",
    )
    parser.add_argument(
        "--config",
        type=str,
        help=(
            "The recipe: a JSON file, or the name of one in configs/, which has: "
            f"{', '.join(sorted(os.listdir(CONFIG_FOLDER)))}"
        ),
    )
    parser.add_class_arguments(Config)
    return parser


def config_option(arguments: Sequence[str]) -> Optional[str]:
    found = [value for flag, value in zip(arguments, arguments[1:]) if flag == "--config"]
    found += [argument[len("--config=") :] for argument in arguments if argument.startswith("--config=")]
    if len(found) > 1:
        raise InputError(
            f"command line: --config is given twice: {', '.join(found)}. Name one; single options override it"
        )
    return found[0] if found else None


def find_config(name: str) -> str:
    for path in (name, os.path.join(CONFIG_FOLDER, name), os.path.join(CONFIG_FOLDER, name + ".json")):
        if os.path.isfile(path):
            return os.path.relpath(path) if os.path.isabs(path) and not os.path.isabs(name) else path
    raise InputError(
        f"{name}: no such config, here or in configs/, which has: {', '.join(sorted(os.listdir(CONFIG_FOLDER)))}"
    )


def check_keys(values: Any, path: str, kind=Config, prefix: str = "") -> None:
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: {prefix.rstrip('.') or 'the file'} is {json.dumps(values)}, expected an object of keys and values"
        )
    known = {one.name: one.type for one in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                "%s: unknown key %s%s; %sexpected one of %s"
                % (path, prefix, key, "did you mean %s%s? " % (prefix, close[0]) if close else "", ", ".join(known))
            )
        # Here, for jsonargparse has no words for it under Python 3.8.
        if get_origin(known[key]) is Literal and value not in get_args(known[key]):
            raise InputError(
                f"{path}: {prefix}{key} is {json.dumps(value)}, expected one of {', '.join(get_args(known[key]))}"
            )
        if kind is Config and key in SECTIONS:
            check_keys(value, path, SECTIONS[key], key + ".")


def flatten(values: Dict[str, Any]) -> Dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update({f"{key}.{inner}": v for inner, v in value.items()} if key in SECTIONS else {key: value})
    return flat


def one_line(error: Exception) -> str:
    text = str(error).replace(
        "Cannot take a Union of no types.", "Expected one of the values in --help"
    )  # its words under Python 3.8
    return " ".join(
        text.replace("typing.", "").replace("<class 'int'>", "int").replace("<class 'float'>", "float").split()
    )


def as_list(value: Union[str, List[str]]) -> List[str]:
    return [value] if isinstance(value, str) else list(value)


def validate(config: Config, source: str = "config") -> None:
    """Raises InputError that names `source`, the key, what was found and what is expected, for the first impossible
    value."""
    model, data, optimizer, training, ipu = config.model, config.data, config.optimizer, config.training, config.ipu

    def expect(good: bool, key: str, expected: str) -> None:
        if not good:
            section, name = key.split(".")
            raise InputError(
                f"{source}: {key} is {json.dumps(getattr(getattr(config, section), name))}, expected {expected}"
            )

    positive = {
        "model": "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
        "type_vocab_size layer_norm_eps initializer_range",
        "data": "sequence_length mask_tokens samples_per_row workers duplicates",
        "optimizer": "learning_rate eps",
        "training": "global_batch_size max_steps log_every save_every keep_checkpoints",
        "ipu": "replication_factor micro_batch_size gradient_accumulation_steps device_iterations loss_scaling",
    }
    for section, names in positive.items():
        for name in names.split():
            value = getattr(getattr(config, section), name)
            expect(value > 0 and math.isfinite(value), f"{section}.{name}", "a number above 0")
    expect(
        model.hidden_size % model.num_attention_heads == 0,
        "model.hidden_size",
        f"a multiple of model.num_attention_heads, {model.num_attention_heads}",
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        expect(0 <= getattr(model, name) < 1, "model." + name, "a probability: at least 0, below 1")
    expect(model.type_vocab_size >= 2, "model.type_vocab_size", "at least 2, one for each segment")
    expect(
        data.sequence_length <= model.max_position_embeddings,
        "data.sequence_length",
        f"at most model.max_position_embeddings, {model.max_position_embeddings}",
    )
    expect(
        data.mask_tokens <= data.sequence_length - 3,
        "data.mask_tokens",
        f"at most data.sequence_length less [CLS] and two [SEP], {data.sequence_length - 3}",
    )
    expect(0 <= data.held_out < 1, "data.held_out", "a share: at least 0, below 1")
    if data.text:
        expect(
            (data.held_out > 0) == bool(data.held_out_files),
            "data.held_out",
            "above 0 where data.held_out_files says where the held-out shards go, 0 where it is empty",
        )
    expect(0 <= optimizer.warmup_ratio <= 1, "optimizer.warmup_ratio", "a share: 0 to 1")
    expect(
        len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas),
        "optimizer.betas",
        "two numbers, each at least 0 and below 1",
    )
    expect(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", "at least 0")
    expect(
        ipu.embedding_serialization_factor is None or ipu.embedding_serialization_factor > 0,
        "ipu.embedding_serialization_factor",
        "a number above 0, or null",
    )
    for name in ("micro_batch_size", "stop_at_step"):
        value = getattr(training, name)
        expect(value is None or value > 0, "training." + name, "a number above 0, or null")
    if training.precision == "float8":
        for name in ("hidden_size", "intermediate_size"):
            expect(getattr(model, name) % 16 == 0, "model." + name, "a multiple of 16, as training.precision is float8")
        expect(
            data.sequence_length % 16 == 0, "data.sequence_length", "a multiple of 16, as training.precision is float8"
        )
    expect(0 <= training.seed < 2**63, "training.seed", "at least 0, below 2 to the 63rd")
    proportions = ipu.matmul_proportion if isinstance(ipu.matmul_proportion, list) else [ipu.matmul_proportion]
    expect(all(0 < share <= 1 for share in proportions), "ipu.matmul_proportion", "shares above 0, at most 1")
    if isinstance(ipu.matmul_proportion, list):
        expect(
            len(proportions) == len(ipu.layers_per_ipu),
            "ipu.matmul_proportion",
            f"one number, or one for each of the {len(ipu.layers_per_ipu)} IPUs of ipu.layers_per_ipu",
        )
    expect(
        all(count >= 0 for count in ipu.layers_per_ipu) and sum(ipu.layers_per_ipu) == model.num_hidden_layers,
        "ipu.layers_per_ipu",
        (
            f"counts that add up to model.num_hidden_layers, {model.num_hidden_layers}; on other devices any "
            f"split will do, such as --ipu.layers_per_ipu '[0, {model.num_hidden_layers}]'"
        ),
    )
    names = set(ipu.operation_proportions)
    expect(
        names <= set(MATMULS) and all(0 < share <= 1 for share in ipu.operation_proportions.values()),
        "ipu.operation_proportions",
        f"shares above 0, at most 1, for some of {', '.join(MATMULS)}",
    )
    if config.device == "ipu" or config.compile_only or config.ipu_model:
        validate_for_ipu(config, source)


def validate_for_ipu(config: Config, source: str = "config") -> None:
    """The same for what only IPUs ask for: static shapes, whole parts, a full pipeline."""
    model, data, training, ipu = config.model, config.data, config.training, config.ipu

    def expect(good: bool, key: str, found, expected: str) -> None:
        if not good:
            raise InputError(f"{source}: {key} is {json.dumps(found)}, expected {expected}")

    expect(
        not (config.compile_only and config.ipu_model),
        "ipu_model",
        True,
        "false with --compile-only: the simulator's executables are not kept",
    )
    expect(
        config.device in ("auto", "ipu"), "device", config.device, '"ipu" or "auto" with --compile-only and --ipu-model'
    )
    geometry = (ipu.micro_batch_size, ipu.gradient_accumulation_steps, ipu.replication_factor)
    product = geometry[0] * geometry[1] * geometry[2]
    expect(
        product == training.global_batch_size,
        "training.global_batch_size",
        training.global_batch_size,
        "ipu.micro_batch_size x gradient_accumulation_steps x replication_factor = %d x %d x %d = %d"
        % (geometry + (product,)),
    )
    expect(
        data.packing != "samples",
        "data.packing",
        data.packing,
        '"rows", "off" or "auto" on IPUs, whose shapes are static',
    )
    expect(
        training.precision in ("auto", "float32"),
        "training.precision",
        training.precision,
        '"auto" (float16) or "float32" on IPUs',
    )
    factor = ipu.embedding_serialization_factor or 1
    expect(
        model.vocab_size % factor == 0,
        "ipu.embedding_serialization_factor",
        factor,
        (
            f"a number that divides model.vocab_size, {model.vocab_size}: "
            f"{', '.join(str(i) for i in range(1, 33) if model.vocab_size % i == 0)}. Or begin with a vocabulary "
            f"padded by unused words: --model.vocab_size {-(-model.vocab_size // factor) * factor}"
        ),
    )
    expect(
        all(ipu.layers_per_ipu[1:]),
        "ipu.layers_per_ipu",
        ipu.layers_per_ipu,
        "at least one layer on each IPU but the first",
    )
    stages = 2 * len(ipu.layers_per_ipu) + 1 if len(ipu.layers_per_ipu) > 1 else 1
    expect(
        ipu.gradient_accumulation_steps >= stages,
        "ipu.gradient_accumulation_steps",
        ipu.gradient_accumulation_steps,
        f"at least {stages}, the stages of the pipeline forward and backward",
    )
    if ipu.automatic_loss_scaling:
        expect(
            training.precision == "auto",
            "ipu.automatic_loss_scaling",
            True,
            'false where training.precision is "float32"',
        )
    for name in ("max_steps", "stop_at_step", "save_every", "log_every"):
        steps = getattr(training, name)
        expect(
            not steps or steps % ipu.device_iterations == 0,
            "training." + name,
            steps,
            f"a multiple of ipu.device_iterations, {ipu.device_iterations}",
        )


def samples_per_row(config: Config, device: str) -> int:
    """How many samples a row may hold: packing `auto` means one on IPUs."""
    packing = config.data.packing
    return 1 if packing == "off" or (packing == "auto" and device == "ipu") else config.data.samples_per_row
