"""Checkpoints: a transformers model folder plus the training state. No pickle in what is written or read.

config.json, model.safetensors, vocab.txt, tokenizer.json, tokenizer_config.json    what transformers loads
optimizer.safetensors                                                              the moments, by parameter name
training_state.json                                                                step, samples seen, the run's config
"""

import json
import os
import re
import shutil
from typing import Dict, List, Optional, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bert.config import ModelConfig
from data.errors import InputError
from data.tokenizer import write_tokenizer_files

__all__ = ["list_checkpoints", "load_moments", "load_weights", "read_json", "save_checkpoint", "write_json"]

# What a transformers config.json must say for its weights to mean the same here; absent keys have these values.
FIXED_KEYS = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


def save_checkpoint(
    folder: str,
    step: int,
    weights: Dict[str, torch.Tensor],
    optimizer_state: Dict[str, torch.Tensor],
    model: ModelConfig,
    words: Sequence[str],
    state: Dict,
    keep: int,
) -> str:
    """Writes folder/step_<step> and removes all but the newest `keep` checkpoints; returns its path.

    It is written under another name, flushed to disk, then renamed: it appears whole or not at all.
    """
    path = os.path.join(folder, f"step_{step:08}")
    temporary = os.path.join(folder, f".step_{step:08}.incomplete")
    remove_incomplete(folder)
    os.makedirs(temporary)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        os.path.join(temporary, "model.safetensors"),
        metadata={"format": "pt"},
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in optimizer_state.items()},
        os.path.join(temporary, "optimizer.safetensors"),
    )
    write_json(os.path.join(temporary, "config.json"), transformers_config(model))
    write_json(os.path.join(temporary, "training_state.json"), state)
    write_tokenizer_files(temporary, words, model.max_position_embeddings)
    for name in ("model.safetensors", "optimizer.safetensors"):  # safetensors makes them readable by their owner alone
        shutil.copymode(os.path.join(temporary, "config.json"), os.path.join(temporary, name))
    for name in os.listdir(temporary):
        flush_to_disk(os.path.join(temporary, name))
    flush_to_disk(temporary)
    os.rename(temporary, path)
    flush_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        os.rename(
            old, os.path.join(folder, f".{os.path.basename(old)}.incomplete")
        )  # so that no half of it is taken for whole
    remove_incomplete(folder)
    return path


def list_checkpoints(folder: str) -> List[str]:
    """The whole checkpoints in `folder`, oldest step first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.fullmatch(r"step_\d{8,}", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[len("step_") :]))]


def load_moments(path: str) -> Dict[str, torch.Tensor]:
    """The optimizer's state in one of our checkpoints. Raises InputError that names the file."""
    try:
        return read_safetensors(os.path.join(path, "optimizer.safetensors"))
    except InputError as error:
        raise InputError(f"{error}. Remove {path} to continue from the checkpoint before it")


def load_weights(
    path: str, expected: Dict[str, torch.Tensor], model: Optional[ModelConfig] = None
) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint or transformers BERT folder, under the names of `expected` (name -> tensor of the
    right shape).

    Parameters that the folder does not have (the heads of a bare BertModel) are left out of the result. With `model`,
    the folder's config.json must describe the same sizes. Raises InputError that names the file, the key, found and
    expected.
    """
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such folder; expected a checkpoint or a BERT folder of transformers")
    if model is not None:
        check_model(read_json(os.path.join(path, "config.json")), model, os.path.join(path, "config.json"))
    file = os.path.join(path, "model.safetensors")
    if not os.path.exists(file):
        raise InputError(
            f"{file}: no such file. Weights are read from safetensors only (a .bin is a pickle, which can run "
            "code): open the model in transformers and save_pretrained() it"
        )
    found = {canonical_name(name, expected): tensor for name, tensor in read_safetensors(file).items()}
    encoder = [name for name in expected if name.startswith("bert.") and not name.startswith("bert.pooler.")]
    missing = [name for name in encoder if name not in found]
    if missing:
        raise InputError(
            f"{file}: {missing[0]} is missing, and {len(missing) - 1} more; found {', '.join(sorted(found)[:5])}"
        )
    weights = {name: found[name] for name in expected if name in found}
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{file}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def canonical_name(name: str, expected: Dict) -> str:
    """Older checkpoints say gamma and beta; a bare BertModel has no prefix."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return "bert." + name if name not in expected and "bert." + name in expected else name


def check_model(found: Dict, model: ModelConfig, path: str) -> None:
    for key, value in FIXED_KEYS.items():
        if found.get(key, value) != value:
            raise InputError(f"{path}: {key} is {found[key]!r}, expected {value!r}")
    wrong = [key for key in SIZE_KEYS if found.get(key, getattr(model, key)) != getattr(model, key)]
    if wrong:
        raise InputError(
            "%s: the model there has other sizes than the config: %s. To train it, add %s"
            % (
                path,
                "; ".join("%s is %s, expected %s" % (key, found[key], getattr(model, key)) for key in wrong),
                " ".join("--model.%s %s" % (key, found[key]) for key in wrong),
            )
        )


def transformers_config(model: ModelConfig) -> Dict:
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
    )
    return dict(
        {name: getattr(model, name) for name in names},
        architectures=["BertForPreTraining"],
        pad_token_id=0,
        tie_word_embeddings=True,
        torch_dtype="float32",
        **FIXED_KEYS,
    )


def remove_incomplete(folder: str) -> None:
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".incomplete"):
            shutil.rmtree(os.path.join(folder, name))


def flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, value: Dict) -> None:
    """Writes a JSON file that appears whole or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".new", path)


def read_json(path: str) -> Dict:
    """The object in a JSON file. Raises InputError that names the file."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}")
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, expected an object of keys and values")
    return value


def read_safetensors(path: str) -> Dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}")
