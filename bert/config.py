"""The configuration of a run, as dataclasses. Each field has its documentation below it and its bounds in its type."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Dict, List, Literal, Optional, Union

from data.packing import SAMPLES_PER_ROW

__all__ = ["Config", "DataConfig", "IpuConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig"]
__all__ += ["TaskConfig", "TrainingConfig"]

# The parser checks the bounds of what a file or the command line gives; a config holds plain numbers.
if TYPE_CHECKING:
    NonNegativeInt = int
    PositiveInt = int
    Seed = int
    SegmentCount = int
    ClosedUnitInterval = float
    NonNegativeNumber = float
    PositiveNumber = float
    Probability = float
    Share = float
else:
    from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
    SegmentCount = restricted_number_type("SegmentCount", int, (">=", 2))
    PositiveNumber = restricted_number_type("PositiveNumber", float, [(">", 0), ("<", math.inf)])
    NonNegativeNumber = restricted_number_type("NonNegativeNumber", float, [(">=", 0), ("<", math.inf)])
    Probability = restricted_number_type("Probability", float, [(">=", 0), ("<", 1)])
    Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])


@dataclass
class ModelConfig:
    """The BERT encoder, in the terms of a transformers config.json; by default that of training.start_from."""

    vocab_size: PositiveInt = 30522
    """Tokens of the vocabulary."""
    hidden_size: PositiveInt = 768
    """Size of a token's vector."""
    num_hidden_layers: PositiveInt = 12
    """Encoder layers."""
    num_attention_heads: PositiveInt = 12
    """Attention heads of a layer; they divide hidden_size."""
    intermediate_size: PositiveInt = 3072
    """Size of the feed-forward layer."""
    max_position_embeddings: PositiveInt = 512
    """The longest sequence, for which the position embedding has room."""
    type_vocab_size: SegmentCount = 2
    """Segments that a sample may have, at most."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of embeddings, attention outputs and feed-forward outputs."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of attention weights."""
    layer_norm_eps: PositiveNumber = 1e-12
    """Added to the variance in every LayerNorm; the recipe has 1e-3."""
    initializer_range: PositiveNumber = 0.02
    """Standard deviation of initial weights, a normal cut off at two of it."""


@dataclass
class DataConfig:
    """The data set: shards, or text to make them from."""

    files: Union[str, List[str]] = field(default_factory=list)
    """Training shards, or labelled files to fine-tune on: a path or glob, or a list. `python -m data.prepare` makes
    shards from text, or the run itself from `data.text`: then by default in the folder data of the run's."""
    held_out_files: Union[str, List[str]] = field(default_factory=list)
    """Shards, or labelled files, that the model is evaluated on at the end; none: no evaluation. And as
    `training.evaluate_every` says."""
    vocab: Optional[str] = None
    """The shards' vocabulary: vocab.txt, tokenizer.json, or their folder; by default beside them.
    For shards to be made from `data.text`: of training.start_from; without either, one is trained."""
    sequence_length: PositiveInt = 128
    """Tokens of a sample, at most."""
    mask_tokens: PositiveInt = 20
    """Masked tokens of a sample, at most."""
    packing: Literal["auto", "samples", "rows", "off"] = "auto"
    """How samples share rows. samples: a global batch is exactly global_batch_size samples, in as few rows as they fit;
    rows: it is that many rows, static shapes, with as many samples as fit; off: one sample a row. auto: samples on CPU
    and CUDA, off on IPUs, whose shapes are static: the same global batches."""
    samples_per_row: PositiveInt = SAMPLES_PER_ROW
    """Samples of a packed row, at most."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """A shard is missing, cut off or holds a bad sample: stop, or skip it and say so."""
    workers: PositiveInt = 2
    """Threads of the loader's process; no more than the machine has cores."""
    text: Union[str, List[str]] = field(default_factory=list)
    """Text to make the shards from, if they are not there: paths, folders, globs, URLs. `python` is the prose that
    Python brings. The shards go into the folder of `data.files`, which must be named train-*.h5."""
    text_format: Literal["auto", "lines", "wikitext", "wikiextractor", "jsonl", "csv", "tsv", "parquet"] = "auto"
    """What separates documents of `text`, by default what each file's name or first lines say. lines: blank lines;
    wikitext: `= Title =` lines; wikiextractor: <doc>; jsonl: each is a line of JSON; csv, tsv, parquet: each is a
    row."""
    text_field: str = "text"
    """The field or column of jsonl, csv, tsv and parquet that holds the text."""
    encoding: str = "utf-8"
    """The encoding of `text`, such as shift_jis; any that Python has."""
    lowercase: Optional[bool] = None
    """Lower-case `text`; null: as the vocabulary's own files say, else true. Not as in Turkish: I becomes i."""
    strip_accents: Optional[bool] = None
    """Remove accents and marks of `text`; null: as the vocabulary says, else as `lowercase`. Hindi's
    vowel signs are such combining marks, and what tells パ from ハ."""
    chinese_characters: Optional[bool] = None
    """Make each Chinese character of `text` a word; null: as the vocabulary says, else true."""
    normalization: Optional[Literal["nfc", "nfkc", "none"]] = None
    """Unicode normal form to bring `text` into; null: as the vocabulary says, else none."""
    duplicates: PositiveInt = 1
    """How often each document of `text` is cut and masked, each time anew."""
    held_out: Probability = 0.0
    """Share of the documents of `text` that goes into held_out-*.h5 instead. That is beside `data.files`."""


@dataclass
class TaskConfig:
    """What the model learns. All but the first two settings are for fine-tuning (docs/fine-tuning.md)."""

    name: str = "pretraining"
    """pretraining: BERT's own two tasks, MLM and NSP. mlm: MLM alone. From labelled files learn classification,
    token_classification, question_answering and multiple_choice. A fork may add its own (bert/tasks)."""
    nsp: bool = True
    """Learn NSP beside MLM. Without it there is no NSP head; `data.prepare --nsp false` makes one-segment samples."""
    glue: Optional[Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]] = None
    """The GLUE task to classify for: it gives files, columns, labels and metric."""
    folder: str = "glue"
    """The folder that GLUE's archive unpacks to, with SST-2/train.tsv and so on in it."""
    text_columns: List[str] = field(default_factory=list)
    """The columns of one text, or of a pair. By default `text`, or those of the task's own files. Of multiple_choice: a
    context, maybe what all endings begin with, and the endings, one by one or a list."""
    label_column: Optional[str] = None
    """The column of the label. By default `label`, or that of the task's own files."""
    labels: List[str] = field(default_factory=list)
    """All labels, in the order of their numbers. By default those in data.files, in alphabetical order."""
    regression: bool = False
    """Labels are numbers to be predicted."""
    metric: Optional[str] = None
    """What the best checkpoint has most of. By default what the task is known by: accuracy, f1, pearson ..."""
    new_head: bool = False
    """A new head, where training.start_from has one for another task or other labels."""
    choices: PositiveInt = 4
    """Of multiple_choice: the endings to choose from."""
    stride: PositiveInt = 128
    """Of question_answering: tokens that two windows of a long context have in common."""
    max_question_tokens: PositiveInt = 64
    """Of question_answering: longer questions are cut."""
    max_answer_tokens: PositiveInt = 30
    """Of question_answering: the longest answer that is looked for."""


@dataclass
class OptimizerConfig:
    """The optimizer, and the schedule of its learning rate, a linear warm-up to the peak and then `schedule`. With
    training.start_from and another optimizer than lamb, the defaults are adamw, 5e-5, a warmup_ratio of 0.1, and a
    max_grad_norm of 1."""

    name: str = "lamb"
    """lamb, adamw or muon. lamb is the recipe's, for large batches, without bias correction; muon is Muon for the
    encoder's matrices and AdamW for the rest. IPUs have lamb and adamw. A fork may add its own (bert/optimizers.py)."""
    learning_rate: PositiveNumber = 0.006
    """The peak. The recipe's is for LAMB and batches of 65,536."""
    schedule: str = "linear"
    """After the warm-up: linear, cosine, wsd or constant. linear: down to 0 after the last step; cosine: the same along
    half a cosine; wsd: the peak, then linear over the last `decay_ratio` of all steps; constant: the peak. Of T steps,
    step s has s / W of the peak in a warm-up of W steps, then (T + 1 - s) / (T + 1 - W): no step has 0. transformers'
    get_linear_schedule_with_warmup has (s - 1) / W, so that its first step changes nothing and step W + 1 has the peak,
    then (T + 1 - s) / (T - W). A fork may add its own (bert/schedules.py)."""
    warmup_ratio: ClosedUnitInterval = 0.28
    """Share of all steps until the peak, rounded up to whole steps."""
    decay_ratio: ClosedUnitInterval = 0.1
    """Share of all steps, the last ones, in which wsd goes down."""
    betas: List[Probability] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and of the second moment."""
    eps: PositiveNumber = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeNumber = 0.01
    """Decay of matrices and embeddings; biases and LayerNorms have none."""
    max_grad_norm: NonNegativeNumber = 0.0
    """Gradients of a larger norm are scaled down to it; 0: none are. The norm is over all parameters. Not on IPUs."""
    trust_ratio_slices: PositiveInt = 1
    """LAMB's trust ratios of the word embedding, which is the MLM decoder too. One for each of so many equal parts of
    the vocabulary. More than 1 is what PopART makes of a serialized decoder when nothing adds up its parts' norms; on
    IPUs it is 1 or ipu.embedding_serialization_factor (docs/ipu.md)."""


@dataclass
class TrainingConfig:
    """The run."""

    global_batch_size: PositiveInt = 65536
    """Samples of one optimizer step. With training.start_from and another optimizer than lamb the default is 32."""
    max_steps: PositiveInt = 10500
    """Optimizer steps of the whole schedule. A run may go on under `resume` with another number, which changes its
    learning rates from there on."""
    epochs: Optional[PositiveNumber] = None
    """How often each example is seen, in place of max_steps."""
    stop_at_step: Optional[PositiveInt] = None
    """Stop after this step, with a checkpoint. The schedule stays as it is. For a time slot shorter than the run."""
    micro_batch_size: Optional[PositiveInt] = None
    """Rows of a forward pass on CPU and CUDA; by default what suits it. The gradient does not depend on it."""
    seed: Seed = 42
    """Seed of the initial weights, the order of samples, and dropout."""
    start_from: Optional[str] = None
    """Folder of a BERT to start from: a checkpoint, or one of transformers. Its config.json gives the defaults of the
    section model. What is said there must agree with it, but for dropouts and initializer_range, which are no part of
    the weights. The optimizer's defaults are then those of adaptation, unless optimizer.name is said to be lamb; so are
    the vocabulary's, of shards made from data.text. Weights are read from safetensors alone."""
    branch_from: Optional[str] = None
    """RUN@STEP to begin with all of: weights, optimizer's state, step, place in the data. RUN is that run's folder; or
    the checkpoint's folder. Learning rate, schedule, max_steps and so on may differ; model sizes, task, optimizer.name
    and data set may not."""
    output: str = ""
    """The run's folder; by default runs/ and the config's name."""
    precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """Type of matrix products: auto, float32, bfloat16 or float8. auto: bfloat16 on CUDA cards and CPUs that multiply
    it natively (AVX512-BF16, AMX), float16 on IPUs, else float32. float8: bfloat16, with the encoder's linear layers in
    float8, scaled tensor by tensor: fast on CUDA cards of compute capability 8.9 or newer, slow on the CPU. Weights
    stay in float32; on IPUs in float16 they are float16 too, and rounded stochastically."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each encoder layer: auto, on or off. auto: on CUDA where Triton is found, not on the CPU, which
    gains nothing."""
    log_every: PositiveInt = 5
    """Steps between two lines of metrics."""
    evaluate_every: Optional[PositiveInt] = None
    """Steps between evaluations on data.held_out_files. By default one, at the end, or where `epochs` are given each
    epoch. The best checkpoint so far is kept, beside the newest, and named in checkpoints/best.json. Not on IPUs."""
    patience: Optional[PositiveInt] = None
    """Stop after so many evaluations in a row without a new best one. By default none is too many."""
    save_every: PositiveInt = 100
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 3
    """How many checkpoints are kept: the newest, and the one of the best evaluation."""


@dataclass
class ParallelConfig:
    """Several processes, on CUDA and CPU, started by torchrun."""

    shard: Literal["none", "optimizer", "full"] = "none"
    """What each process has a part of only: none, optimizer or full. optimizer: the optimizer's state and the float32
    weights that it updates; full: the weights that the model computes with too, which are gathered layer by layer."""
    pipeline: PositiveInt = 1
    """Processes that hold one copy of the model, some layers each. Micro-batches go from one to the next."""
    stages_per_process: PositiveInt = 1
    """Runs of layers of each process of a pipeline. With more, each waits less and sends more."""
    timeout: PositiveNumber = 300.0
    """Seconds that a process waits for others before the run ends with an error. Longer than a checkpoint takes to
    write."""


@dataclass
class IpuConfig:
    """The pipeline on IPUs: placement, batch geometry, memory. Others use only embedding_serialization_factor."""

    layers_per_ipu: List[NonNegativeInt] = field(default_factory=lambda: [0, 4, 4, 4])
    """Encoder layers on each IPU of a replica; embeddings and heads are on IPU 0."""
    replication_factor: PositiveInt = 4
    """Replicas: copies of the whole pipeline."""
    micro_batch_size: PositiveInt = 32
    """Rows of one forward pass of one replica."""
    gradient_accumulation_steps: PositiveInt = 512
    """Micro-batches of one replica in one optimizer step."""
    device_iterations: PositiveInt = 1
    """Optimizer steps in one call of the executable, all with the learning rate of the last one."""
    embedding_serialization_factor: Optional[PositiveInt] = None
    """Parts in which the MLM decoder and its loss are computed, so that the logits never exist all at once: by default
    1 on IPUs, elsewhere as many as keep a part's logits small. IPUs cut the vocabulary, so it must divide
    model.vocab_size there."""
    matmul_proportion: Union[Share, List[Share]] = 0.25
    """Share of an IPU's memory that a matrix product may take for temporaries: one for all IPUs, or one for each."""
    operation_proportions: Dict[str, Share] = field(default_factory=dict)
    """The same for some products, by name: query_key_value, attention_scores, attention_context, attention_output,
    intermediate, output, select_tokens, mlm_transform, mlm_decoder."""
    loss_scaling: PositiveNumber = 16384.0
    """Keeps float16 gradients from underflow."""
    automatic_loss_scaling: bool = False
    """Begin with loss_scaling, and adjust it as gradients grow and shrink."""
    stochastic_rounding: bool = True
    """Round float16 values up or down by chance, so that small updates of weights are not lost."""
    recompute_checkpoint_every_layer: bool = True
    """Keep each layer's input for the backward pass and recompute what follows it."""
    replicated_tensor_sharding: bool = True
    """Split the optimizer's state over the replicas, under poprun over those of one process."""
    instances: PositiveInt = 1
    """Processes that poprun starts for all replicas: --plan counts with them, and poprun has to start as many."""
    optimizer_state_offchip: bool = False
    """Keep the optimizer's state in the host's memory."""
    enable_half_partials: bool = True
    """Partial sums of matrix products in float16."""
    enable_half_first_order_momentum: bool = True
    """The optimizer's first moment in float16."""
    executable_cache_dir: str = "./exe_cache"
    """Folder that keeps compiled executables."""
    synthetic_data: bool = False
    """Let the IPUs generate their input, to measure them without the host; no losses, nothing saved."""
    profile_folder: Optional[str] = None
    """Folder for a profile that PopVision reads, also of a model that does not fit."""


@dataclass
class Config:
    """BERT pre-training: config -> shards -> global batches -> optimizer -> checkpoint that transformers loads."""

    device: Literal["auto", "ipu", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto: on IPUs if there are some, else on CUDA, an Apple GPU (mps), or the CPU. auto
    takes mps only if a tiny model's step there is that on the CPU."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the run in training.output, if there is one. Exactly from where its newest checkpoint is."""
    plan: bool = False
    """Instead of training, print what would run where, and how long it takes. How full each IPU gets is drawn, too. For
    ipu (and auto, where the ipu section gives the global batch) it needs no device; for cuda and cpu it measures."""
    compile_only: bool = False
    """Compile for IPUs into ipu.executable_cache_dir and stop; needs PopTorch, but no IPU."""
    ipu_model: bool = False
    """Run on Graphcore's simulator in place of IPUs, for small models."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ipu: IpuConfig = field(default_factory=IpuConfig)
