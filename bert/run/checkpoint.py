"""Checkpoints: a transformers model folder plus the training state. No pickle in what is written or read.

config.json, model.safetensors, vocab.txt, tokenizer*.json    what transformers loads
optimizer.safetensors                                         the optimizer's state, by parameter name
training_state.json                                           step, samples seen, the run's config

Of a run whose processes each hold a part, the folders weights/ and optimizer/ have a file of each instead of the two
files (bert/run/sharded_checkpoint.py). Beside a run's checkpoints, best.json names the one of the lowest held-out loss.
"""

import dataclasses
import os
import re
import shutil
from typing import Collection, Dict, List, Mapping, Optional, Union

import torch
from safetensors.torch import save_file

from bert.config import ModelConfig
from bert.run.shards import Shards, WholeFile, opened
from bert.start_from import ARCHITECTURE, DECISIVE_KEYS, check_is_folder, read_model
from data.errors import InputError
from data.files import flush_to_disk, read_json, write_json
from data.tokenizer import Vocabulary, write_tokenizer_files
from ops.shards import is_dtensor

__all__ = ["begin_checkpoint", "check_model", "complete_checkpoint", "list_checkpoints", "load_optimizer_state"]
__all__ += ["load_weights", "mark_best", "name_of", "open_tensors", "open_weights", "read_safetensors"]
__all__ += ["save_checkpoint", "transformers_config"]

Tensors = Mapping[str, torch.Tensor]


def save_checkpoint(
    folder: str,
    state: Dict,
    weights: Tensors,
    optimizer_state: Tensors,
    model: Dict,
    vocabulary: Vocabulary,
    keep: int,
) -> str:
    """Writes folder/step_<step> and removes all checkpoints but the newest `keep` and the best; returns its path.

    `state` is training_state.json, which has the step, and as `best` the line of held_out.jsonl with the lowest loss;
    `model` is config.json (`transformers_config`). It is written under another name, flushed to disk, then renamed: it
    appears whole or not at all.
    """
    temporary = begin_checkpoint(folder, state["step"])
    for file, tensors in {"model.safetensors": weights, "optimizer.safetensors": optimizer_state}.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"format": "pt"} if tensors is weights else None
        save_file(contiguous, os.path.join(temporary, file), metadata=metadata)
    return complete_checkpoint(temporary, state, model, vocabulary, keep)


def begin_checkpoint(folder: str, step: int) -> str:
    """A new folder for the tensors of a checkpoint, until `complete_checkpoint`; what others left there goes."""
    remove_incomplete(folder)
    temporary = os.path.join(folder, f".{name_of(step)}.incomplete")
    os.makedirs(temporary)
    return temporary


def complete_checkpoint(temporary: str, state: Dict, model: Dict, vocabulary: Vocabulary, keep: int) -> str:
    """Makes a folder with all tensors a checkpoint; the rest is as `save_checkpoint` says."""
    folder = os.path.dirname(temporary)
    path, config = os.path.join(folder, name_of(state["step"])), os.path.join(temporary, "config.json")
    write_json(config, model)
    write_json(os.path.join(temporary, "training_state.json"), state)
    write_tokenizer_files(temporary, vocabulary, model["max_position_embeddings"])
    for place, _, files in os.walk(temporary):
        for file in files:
            shutil.copymode(config, os.path.join(place, file))  # safetensors makes them readable by their owner alone
            flush_to_disk(os.path.join(place, file))
        flush_to_disk(place)
    os.rename(temporary, path)
    flush_to_disk(folder)
    mark_best(folder, state.get("best", {}), keep)
    return path


def mark_best(folder: str, best: Mapping, keep: int) -> None:
    """Has best.json name the checkpoint of the lowest held-out loss, if it is there, with its line of held_out.jsonl;
    and removes all checkpoints but it and the newest `keep`."""
    path = os.path.join(folder, name_of(best.get("step", 0)))
    if os.path.isdir(path):
        write_json(os.path.join(folder, "best.json"), {"checkpoint": os.path.basename(path), **best})
    for old in list_checkpoints(folder)[:-keep]:
        if old != path:  # first renamed, so that no half of it is taken for whole
            os.rename(old, os.path.join(folder, f".{os.path.basename(old)}.incomplete"))
    remove_incomplete(folder)


def name_of(step: int) -> str:
    return f"step_{step:08}"


def list_checkpoints(folder: str) -> List[str]:
    """The whole checkpoints in `folder`, oldest step first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.fullmatch(r"step_\d{8,}", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(name[len("step_") :]))]


def load_optimizer_state(path: str, weights: Optional[Tensors] = None) -> Dict[str, torch.Tensor]:
    """The optimizer's state in one of our checkpoints: all of it, or what belongs to `weights` (name -> tensor), and of
    DTensors among them, such parts as they are. Raises InputError that names the file."""
    likes: Dict[str, torch.Tensor] = {}
    try:
        source = open_tensors(path, "optimizer.safetensors", "optimizer", (weights or {}).values())
        for name, shape in source.shapes.items():
            parameter = (weights or {}).get(name.rpartition(".")[0])
            if parameter is not None and parameter.shape == shape:
                likes[name] = parameter
            elif parameter is not None or weights is None:
                likes[name] = torch.empty(()).expand(shape)
        return source.read(likes)
    except InputError as error:
        raise InputError(f"{error}. Remove {path} to continue from the checkpoint before it")


def open_tensors(path: str, file: str, folder: str, likes: Collection[torch.Tensor] = ()) -> Union[WholeFile, Shards]:
    """What a checkpoint has in `file`, or in shards in `folder`, to read what is like `likes`.

    Raises InputError that names a file which is missing or cannot be read.
    """
    whole, shards = os.path.join(path, file), os.path.join(path, folder)
    distributed = any(map(is_dtensor, likes))
    if os.path.isdir(shards) and (distributed or not os.path.exists(whole)):
        for name in read_json(os.path.join(path, "training_state.json"))["shards"]:
            if name.startswith(f"{folder}/") and not os.path.exists(os.path.join(path, name)):
                raise InputError(f"{os.path.join(path, name)}: no such file; it is a shard of the checkpoint")
        return Shards(shards)
    return Shards(path) if distributed and os.path.exists(whole) else WholeFile(whole)


def load_weights(
    path: str, expected: Mapping[str, torch.Tensor], model: Optional[Dict] = None
) -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint or transformers BERT folder, under the names of `expected` (name -> tensor of the
    right shape); for a DTensor there, such a part as it is.

    Parameters that the folder does not have (the heads of a bare BertModel) are left out of the result. With `model`
    (`transformers_config`), the folder's config.json must describe the same architecture and sizes. Raises InputError
    that names the file, the key, found and expected.
    """
    if model is not None:
        check_model(path, model)
    source = open_weights(path, expected.values())
    names = {canonical_name(name, expected): name for name in source.shapes}
    encoder = [name for name in expected if name.startswith("bert.") and not name.startswith("bert.pooler.")]
    missing = [name for name in encoder if name not in names]
    if missing:
        there = ", ".join(sorted(names)[:5])
        raise InputError(f"{source.path}: {missing[0]} is missing, and {len(missing) - 1} more; found {there}")
    for name in expected:
        if name in names and source.shapes[names[name]] != expected[name].shape:
            shape = list(source.shapes[names[name]])
            raise InputError(f"{source.path}: {name} is {shape}, expected {list(expected[name].shape)}")
    likes = {names[name]: like for name, like in expected.items() if name in names}
    tensors = source.read(likes, torch.float32)
    return {name: tensors[names[name]] for name in expected if name in names}


def open_weights(path: str, likes: Collection[torch.Tensor] = ()) -> Union[WholeFile, Shards]:
    """The weights of a checkpoint or transformers folder, to read what is like `likes`. Raises InputError where there
    are none in safetensors."""
    check_is_folder(path)
    file = os.path.join(path, "model.safetensors")
    if not os.path.exists(file) and not os.path.isdir(os.path.join(path, "weights")):
        raise InputError(
            f"{file}: no such file. Weights are read from safetensors only (a .bin is a pickle, which can run code): "
            "open the model in transformers and save_pretrained() it"
        )
    return open_tensors(path, "model.safetensors", "weights", likes)


def canonical_name(name: str, expected: Tensors) -> str:
    """Older checkpoints say gamma and beta; a bare BertModel has no prefix."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return "bert." + name if name not in expected and "bert." + name in expected else name


def check_model(path: str, model: Dict) -> None:
    """Raises InputError where the config.json in a folder describes another model than `model`
    (`transformers_config`)."""
    there, file = read_model(path), os.path.join(path, "config.json")
    for key, default in ARCHITECTURE.items():
        if there[key] != model.get(key, default):
            expected = f"{model.get(key, default)!r}: it is a model of another kind"
            raise InputError(f"{file}: {key} is {there[key]!r}, expected {expected}")
    wrong = [key for key in DECISIVE_KEYS if there[key] != model[key]]
    if wrong:
        values = "; ".join(f"{key} is {there[key]}, expected {model[key]}" for key in wrong)
        options = " ".join(f"--model.{key} {there[key]}" for key in wrong)
        raise InputError(f"{file}: the model there is not the config's: {values}. To train it, add {options}")


def transformers_config(config: ModelConfig, architecture: Mapping[str, str], class_name: str) -> Dict:
    """What config.json says: sizes, how the model computes, and transformers' class for it."""
    others = dict(architectures=[class_name], pad_token_id=0, tie_word_embeddings=True, torch_dtype="float32")
    return {**dataclasses.asdict(config), **others, **architecture}


def remove_incomplete(folder: str) -> None:
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".incomplete"):
            shutil.rmtree(os.path.join(folder, name))


def read_safetensors(path: str) -> Dict[str, torch.Tensor]:
    """All tensors of a file. Raises InputError that names it."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
