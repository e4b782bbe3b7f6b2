"""Checkpoints: a transformers model folder plus the training state. No pickle in what is written or read.

config.json, model.safetensors, vocab.txt, tokenizer*.json    what transformers loads
optimizer.safetensors                                         the optimizer's state, by parameter name
training_state.json                                           step, samples seen, the run's config
"""

import dataclasses
import os
import re
import shutil
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bert.config import ModelConfig
from data.errors import InputError
from data.files import flush_to_disk, read_json, write_json
from data.tokenizer import write_tokenizer_files

__all__ = ["list_checkpoints", "load_optimizer_state", "load_weights", "save_checkpoint", "transformers_config"]

Tensors = Mapping[str, torch.Tensor]
# What a config.json must say alike for its weights to mean the same here.
ARCHITECTURE_KEYS = ("model_type", "hidden_act", "position_embedding_type")
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
    folder: str, state: Dict, weights: Tensors, optimizer_state: Tensors, model: Dict, tokens: Sequence[str], keep: int
) -> str:
    """Writes folder/step_<step> and removes all but the newest `keep` checkpoints; returns its path.

    `state` is training_state.json, which has the step; `model` is config.json (`transformers_config`), `tokens` the
    vocabulary. It is written under another name, flushed to disk, then renamed: it appears whole or not at all.
    """
    name = f"step_{state['step']:08}"
    path, temporary = os.path.join(folder, name), os.path.join(folder, f".{name}.incomplete")
    remove_incomplete(folder)
    os.makedirs(temporary)
    files = {"model.safetensors": weights, "optimizer.safetensors": optimizer_state}
    for file, tensors in files.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"format": "pt"} if tensors is weights else None
        save_file(contiguous, os.path.join(temporary, file), metadata=metadata)
    write_json(os.path.join(temporary, "config.json"), model)
    write_json(os.path.join(temporary, "training_state.json"), state)
    write_tokenizer_files(temporary, tokens, model["max_position_embeddings"])
    for file in files:  # safetensors makes them readable by their owner alone
        shutil.copymode(os.path.join(temporary, "config.json"), os.path.join(temporary, file))
    for file in os.listdir(temporary):
        flush_to_disk(os.path.join(temporary, file))
    flush_to_disk(temporary)
    os.rename(temporary, path)
    flush_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        # So that no half of it is taken for whole.
        os.rename(old, os.path.join(folder, f".{os.path.basename(old)}.incomplete"))
    remove_incomplete(folder)
    return path


def list_checkpoints(folder: str) -> List[str]:
    """The whole checkpoints in `folder`, oldest step first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.fullmatch(r"step_\d{8,}", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[len("step_") :]))]


def load_optimizer_state(path: str) -> Dict[str, torch.Tensor]:
    """The optimizer's state in one of our checkpoints. Raises InputError that names the file."""
    try:
        return read_safetensors(os.path.join(path, "optimizer.safetensors"))
    except InputError as error:
        raise InputError(f"{error}. Remove {path} to continue from the checkpoint before it")


def load_weights(
    path: str, expected: Mapping[str, torch.Tensor], model: Optional[Dict] = None
) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint or transformers BERT folder, under the names of `expected` (name -> tensor of the
    right shape).

    Parameters that the folder does not have (the heads of a bare BertModel) are left out of the result. With `model`
    (`transformers_config`), the folder's config.json must describe the same architecture and sizes. Raises InputError
    that names the file, the key, found and expected.
    """
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such folder; expected a checkpoint or a BERT folder of transformers")
    if model is not None:
        config = os.path.join(path, "config.json")
        check_model(read_json(config), model, config)
    file = os.path.join(path, "model.safetensors")
    if not os.path.exists(file):
        raise InputError(
            f"{file}: no such file. Weights are read from safetensors only (a .bin is a pickle, which can run code): "
            "open the model in transformers and save_pretrained() it"
        )
    tensors = {canonical_name(name, expected): tensor for name, tensor in read_safetensors(file).items()}
    encoder = [name for name in expected if name.startswith("bert.") and not name.startswith("bert.pooler.")]
    missing = [name for name in encoder if name not in tensors]
    if missing:
        there = ", ".join(sorted(tensors)[:5])
        raise InputError(f"{file}: {missing[0]} is missing, and {len(missing) - 1} more; found {there}")
    weights = {name: tensors[name] for name in expected if name in tensors}
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{file}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def canonical_name(name: str, expected: Tensors) -> str:
    """Older checkpoints say gamma and beta; a bare BertModel has no prefix."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return "bert." + name if name not in expected and "bert." + name in expected else name


def check_model(there: Dict, model: Dict, path: str) -> None:
    """Raises InputError where a config.json describes another model; keys that it lacks have our values."""
    for key in ARCHITECTURE_KEYS:
        if there.get(key, model[key]) != model[key]:
            raise InputError(f"{path}: {key} is {there[key]!r}, expected {model[key]!r}")
    wrong = [key for key in SIZE_KEYS if there.get(key, model[key]) != model[key]]
    if wrong:
        sizes = "; ".join(f"{key} is {there[key]}, expected {model[key]}" for key in wrong)
        options = " ".join(f"--model.{key} {there[key]}" for key in wrong)
        raise InputError(
            f"{path}: the model there has other sizes than the config: {sizes}. To train it, add {options}"
        )


def transformers_config(config: ModelConfig, architecture: Mapping[str, str], class_name: str) -> Dict:
    """What config.json says: sizes, how the model computes, and transformers' class for it."""
    others = dict(architectures=[class_name], pad_token_id=0, tie_word_embeddings=True, torch_dtype="float32")
    return {**dataclasses.asdict(config), **others, **architecture}


def remove_incomplete(folder: str) -> None:
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".incomplete"):
            shutil.rmtree(os.path.join(folder, name))


def read_safetensors(path: str) -> Dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}")
