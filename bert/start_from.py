"""The defaults of a run that starts from a BERT folder: the model from there, and an optimizer that suits few steps."""

import dataclasses
import json
import os
from operator import attrgetter
from typing import Any, Dict, Mapping

from bert.config import Config, ModelConfig
from data.errors import InputError
from data.files import read_json

__all__ = [
    "ADAPTING",
    "ARCHITECTURE",
    "DECISIVE_KEYS",
    "FINE_TUNED",
    "adapting_line",
    "check_is_folder",
    "defaults_of_start",
]
__all__ += ["check_head", "read_model", "sizes_of"]

# The defaults of transformers' BertConfig for what must be alike for weights to mean the same here; those of sizes are
# ModelConfig's.
ARCHITECTURE = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}
DECISIVE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)
FINE_TUNED = tuple(
    f"BertFor{task}"
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
)
# Unless the optimizer is said to be LAMB, whose defaults are the recipe's.
ADAPTING = {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 5e-5,
    "optimizer.warmup_ratio": 0.1,
    "optimizer.max_grad_norm": 1.0,
    "training.global_batch_size": 32,
}


def read_model(folder: str) -> Dict[str, Any]:
    """What config.json says in a checkpoint or a BERT folder of transformers; what it leaves out is BERT's default.

    Raises InputError where there is none, and for a size that is no number.
    """
    check_is_folder(folder)
    path = os.path.join(folder, "config.json")
    there = {**dataclasses.asdict(ModelConfig()), **ARCHITECTURE, **read_json(path)}
    for key, default in dataclasses.asdict(ModelConfig()).items():
        if type(there[key]) not in (int, type(default)):
            raise InputError(f"{path}: {key} is {json.dumps(there[key])}, expected a number such as {default}")
    return there


def check_head(folder: str, architecture: str, heads: Mapping[str, Any]) -> None:
    """Raises InputError where a BERT folder was fine-tuned for another task than that of transformers' class
    `architecture`, or for other labels than `heads`, part of its config.json, has."""
    path = os.path.join(folder, "config.json")
    there = read_json(path)
    known = [name for name in there.get("architectures") or [] if name in FINE_TUNED]
    # transformers leaves out what is its default.
    found, expected = there.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}, heads.get("id2label")
    if not known or (architecture in known and expected in (None, found)):
        return
    differs = f"architectures is {known}, expected {architecture}"
    if architecture in known:
        differs = f"id2label is {json.dumps(found)}, expected {json.dumps(expected)}"
    raise InputError(
        f"{path}: {differs}: it was fine-tuned for something else. To keep its encoder and begin with a new head add "
        "--task.new_head true; to go on with its labels set task.labels to them"
    )


def sizes_of(there: Mapping[str, Any]) -> ModelConfig:
    """What `read_model` gives, without what is no size."""
    return ModelConfig(**{field.name: there[field.name] for field in dataclasses.fields(ModelConfig)})


def check_is_folder(path: str) -> None:
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such folder; expected a checkpoint or a BERT folder of transformers")


def defaults_of_start(in_file: Mapping[str, Any], options: Mapping[str, Any], output: str, source: str) -> Dict:
    """By dotted key, the defaults of a run with these settings in its config file, `source`, and in options, which
    override them; `output` is its folder.

    The model is that of training.start_from. Dropouts and the initial weights' range may be said otherwise, for they
    are no part of the weights. A run that is resumed has the settings that it began with.
    Raises InputError where a setting makes another model of the weights.
    """
    said = {**in_file, **options}
    folder, begun = said["training.start_from"], os.path.join(output, "run.json")
    if said.get("resume") == "auto" and os.path.exists(begun):
        return read_json(begun)
    there = read_model(folder)
    wrong = [key for key in DECISIVE_KEYS if model_of(said).get(key, there[key]) != there[key]]
    if wrong:
        own, their = ({key: json.dumps(values[key]) for key in wrong} for values in (model_of(said), there))
        blamed = "command line" if model_of(options).keys() >= own.keys() else source
        raise InputError(
            f"{blamed}: {words('model.{} is {}', own)}, but {os.path.join(folder, 'config.json')}, which "
            f"training.start_from names, has {words('{} {}', their)}. To train that model leave out what the config "
            f"says of it, or add {words('--model.{} {}', their, ' ')}"
        )
    model = {f"model.{key}": there[key] for key in dataclasses.asdict(ModelConfig())}
    length = min(Config().data.sequence_length, there["max_position_embeddings"])
    adapting = {} if said.get("optimizer.name") == "lamb" else ADAPTING
    return {**model, **adapting, "data.sequence_length": length}


def model_of(said: Mapping[str, Any]) -> Dict[str, Any]:
    return {key[len("model.") :]: value for key, value in said.items() if key.startswith("model.")}


def words(form: str, values: Mapping[str, str], separator: str = ", ") -> str:
    return separator.join(form.format(*item) for item in values.items())


def adapting_line(config: Config) -> str:
    """Which settings of a run that starts from a folder are the defaults of one, in words."""
    same = [f"{key} {value}" for key, value in ADAPTING.items() if attrgetter(key)(config) == value]
    optimizer = f"optimizer {config.optimizer.name} at {config.optimizer.learning_rate:g}"
    return f"{optimizer}; defaults of a run that starts from a folder: {', '.join(same) or 'none'}"
