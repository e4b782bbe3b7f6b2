"""Evaluates any BERT on shards: `python -m bert.evaluate --help` tells how."""

import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

from data.commands import check_options, option, parse_options, run_command
from data.errors import InputError

__all__ = ["EvaluateOptions", "evaluate", "has_heads", "main"]

VOCABULARIES = ("vocab.txt", "tokenizer.json")
EXAMPLES = """examples:
  python -m bert.evaluate runs/quickstart/checkpoints/step_00000640 --data.files 'shards/own/held_out-*.h5'
  python -m bert.evaluate bert-base-uncased --data.files 'shards/own/held_out-*.h5' --device cuda --json"""


@dataclass
class EvaluateOptions:
    """The loss, perplexity and accuracy of a model on the masked samples of shards, each once, without dropout. Model
    and shards must have the same vocabulary. Of a checkpoint of run_finetuning.py: what its task scores on labelled
    files."""

    checkpoint: str = option(flag="checkpoint")
    """a checkpoint of a run, of one process or of many, or any BERT folder of transformers with an MLM head"""
    files: List[str] = option(flag="--data.files")
    """shards, or labelled files: paths or quoted globs"""
    device: str = option("auto", metavar="NAME")
    """cuda, cpu or auto: the best that is there"""
    precision: str = option("float32", choices=("auto", "float32", "bfloat16"))
    """type of matrix products; auto: as training has it"""
    batch_size: int = option(32, lambda value: value > 0, "1 or more")
    """samples of a forward pass; more need more memory"""
    json: bool = option(False)
    """print one JSON object in place of the table"""


def evaluate(options: EvaluateOptions) -> Dict[str, Any]:
    """The means over all samples: of the loss, of its parts and their accuracies, and `perplexity`, which is e to the
    power of the MLM loss. NSP is left out where the model has no head for it, or samples have one segment.

    Raises InputError for a folder that is no such model, and shards that it was not made for.
    """
    from bert.config import Config, DataConfig, TaskConfig  # torch takes seconds to import
    from bert.engines import find_device, make_engine
    from bert.run import evaluation
    from bert.run.checkpoint import load_weights, transformers_config
    from bert.start_from import FINE_TUNED, read_model, sizes_of
    from data.loading.shard_files import open_shards
    from data.rows import WHOLE
    from data.tokenizer import find_vocab

    check_options(options)
    path = options.checkpoint
    there = read_model(path)
    if set(there.get("architectures") or []) & set(FINE_TUNED):
        return evaluate_examples(options)
    model = sizes_of(there)
    shards = open_shards(options.files, vocab_size=model.vocab_size)
    vocabulary = next((name for name in VOCABULARIES if os.path.exists(os.path.join(path, name))), VOCABULARIES[0])
    find_vocab(os.path.join(path, vocabulary), shards, "another checkpoint")
    nsp = has_heads(path, there) and shards[0].segments > 1
    length, masks = shards[0].sequence_length, shards[0].mask_tokens
    if length > model.max_position_embeddings:
        raise InputError(
            f"{shards[0].path}: its samples have sequence length {length}, and {path} has "
            f"{model.max_position_embeddings} positions. Prepare the text again with a shorter --sequence-length"
        )
    data = DataConfig(held_out_files=options.files, sequence_length=length, mask_tokens=masks)
    config = Config(model=model, task=TaskConfig(nsp=nsp), data=data)
    config.training.precision = options.precision  # type: ignore[assignment]  # `choices` has checked it
    config.training.micro_batch_size = options.batch_size
    config.device = options.device  # type: ignore[assignment]  # the engines say which there are
    engine = make_engine(config, find_device(config)[0])
    described = transformers_config(model, engine.model.architecture, engine.task.architecture)
    engine.load_weights(load_weights(path, dict(engine.model.named_parameters()), described))
    means = evaluation.evaluate(config, engine, WHOLE)
    del means["step"]
    return {"checkpoint": path, **means, "perplexity": math.exp(means[engine.task.panels[0].loss])}


def evaluate_examples(options: EvaluateOptions) -> Dict[str, Any]:
    """The same of a checkpoint that was fine-tuned, on labelled files: what its task scores."""
    from bert.config import Config, ParallelConfig
    from bert.engines import find_device, make_engine
    from bert.run.checkpoint import load_weights
    from bert.run.example_set import HeldOut
    from bert.run.state import read_config
    from bert.tasks import ExampleTask, make_task
    from data.examples.records import existing
    from data.rows import WHOLE
    from data.tokenizer import read_vocab

    path = options.checkpoint
    config: Config = read_config(path)
    config.training.precision = options.precision  # type: ignore[assignment]  # `choices` has checked it
    config.training.micro_batch_size = options.batch_size
    config.device = options.device  # type: ignore[assignment]  # the engines say which there are
    config.parallel = ParallelConfig()  # the run's were for its processes
    task, device = make_task(config), find_device(config)[0]
    assert isinstance(task, ExampleTask)
    held_out = HeldOut(config, task, device, read_vocab(path), existing(options.files))
    engine = make_engine(config, device)
    engine.load_weights(load_weights(path, dict(engine.model.named_parameters())))
    found = held_out.evaluate(engine, WHOLE)
    del found["step"]
    return {"checkpoint": path, **found}


def has_heads(path: str, config: Dict) -> bool:
    """Whether the model in the folder has an NSP head. Raises InputError where it has no MLM head, or one whose decoder
    is not the word embedding."""
    from bert.run.checkpoint import open_weights

    names = open_weights(path).shapes
    if "cls.predictions.transform.dense.weight" not in names:
        raise InputError(
            f"{path}: has no MLM head (cls.predictions), so it predicts no tokens; expected a BertForMaskedLM, a "
            "BertForPreTraining or a checkpoint of a pre-training run. To train a head: run_pretraining.py "
            "--training.start_from"
        )
    if not config.get("tie_word_embeddings", True):
        raise InputError(f"{path}/config.json: tie_word_embeddings is false, expected true: the decoder is them")
    return "cls.seq_relationship.weight" in names and "bert.pooler.dense.weight" in names


def report(options: EvaluateOptions) -> str:
    found = evaluate(options)
    if options.json:
        return json.dumps(found, indent=2)
    figures = {name.replace("_", " "): f"{value:.4f}" for name, value in found.items() if isinstance(value, float)}
    lines = {"samples": f"{found['samples']:,}", **figures}
    width = 2 + max(14, *map(len, lines))
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: print(report(parse_options(EvaluateOptions, arguments, "bert.evaluate", EXAMPLES))))


if __name__ == "__main__":
    sys.exit(main())
