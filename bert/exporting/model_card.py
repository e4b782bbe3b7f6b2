"""README.md of an exported model, in the form of the Hugging Face hub (huggingface.co/docs/hub/model-cards), filled in
from the checkpoint and the run that it belongs to. Of paths and URLs only the last part gets into it.
"""

import dataclasses
import json
import math
import os
import re
import statistics
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from bert.config import OptimizerConfig, TaskConfig
from bert.run.checkpoint import open_weights
from bert.run.curve import read_metrics
from bert.run.state import read_config
from bert.text import count_of, duration
from data.files import read_json
from data.preparing.remote import base_name
from data.tokenizer import rules_in_words

__all__ = ["CURVE", "Card", "make_card", "run_folder_of"]

CURVE = "curve.png"


class Use(NamedTuple):
    """How a class of transformers is used."""

    task: str
    """the hub's name of what it does"""
    code: str
    """Python that does it with the model NAME"""
    has_pipeline_tag: bool = True


FILL_MASK = Use(
    "fill-mask",
    """from transformers import pipeline

fill_mask = pipeline("fill-mask", model=NAME)
print(fill_mask("The capital of France is [MASK]."))""",
)
USES = {
    "BertForPreTraining": FILL_MASK,
    "BertForMaskedLM": FILL_MASK,
    "BertForSequenceClassification": Use(
        "text-classification",
        """from transformers import pipeline

classify = pipeline("text-classification", model=NAME)
print(classify({"text": "A film to remember."}))  # of a pair of texts: {"text": ..., "text_pair": ...}""",
    ),
    "BertForTokenClassification": Use(
        "token-classification",
        """from transformers import pipeline

tag = pipeline("token-classification", model=NAME, aggregation_strategy="simple")
print(tag("Ada Lovelace was born in London."))""",
    ),
    "BertForQuestionAnswering": Use(
        "question-answering",
        """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(NAME), AutoModelForQuestionAnswering.from_pretrained(NAME)
inputs = tokenizer("Where was she born?", "Ada Lovelace was born in London.", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
    ),
    "BertForMultipleChoice": Use(
        "multiple-choice",
        """from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(NAME), AutoModelForMultipleChoice.from_pretrained(NAME)
choices = ["She opens it.", "She eats it."]
inputs = tokenizer(["She finds a letter."] * len(choices), choices, padding=True, return_tensors="pt")
logits = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits
print(choices[logits.argmax()])""",
        has_pipeline_tag=False,
    ),
}
"""Class of transformers -> its use."""
ENCODER = Use(
    "feature-extraction",
    """from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(NAME), AutoModel.from_pretrained(NAME)
print(model(**tokenizer("The capital of France.", return_tensors="pt")).last_hidden_state.shape)""",
)
HYPER_PARAMETERS: Dict[str, Sequence[str]] = {
    "optimizer": [field.name for field in dataclasses.fields(OptimizerConfig)],
    "training": ("global_batch_size", "max_steps", "epochs", "seed", "precision", "start_from"),
    "data": ("sequence_length", "mask_tokens", "packing"),
    "model": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
"""Section of the config -> the keys that the card has."""
HUB_METRICS = {"exact": "exact_match", "pearson": "pearsonr", "spearman": "spearmanr"}
"""Score of held_out.jsonl -> the hub's name of the metric, where it has another (huggingface.co/metrics)."""
NOT_OF_TASK = ("folder", "labels", "new_head")  # config.json has the labels


@dataclasses.dataclass
class Card:
    """What the card is made of beside the checkpoint."""

    name: str
    """the model's"""
    place: str
    """where transformers finds it: a folder, or USER/NAME on the hub"""
    license: str
    """as the hub names it, such as apache-2.0"""
    language: str = ""
    """its code, such as tr"""
    base_model: str = ""
    """what it was made of, by its name on the hub"""
    onnx: str = ""
    """the ONNX file in the folder, if it is there"""


def use_of(model: Mapping) -> Use:
    """By config.json; that of the encoder for a fork's class."""
    return USES.get(model["architectures"][0], ENCODER)


def run_folder_of(checkpoint: str) -> Optional[str]:
    """The folder of the run that a checkpoint lies in; None where it was taken out of it."""
    checkpoints = os.path.dirname(os.path.abspath(checkpoint))
    folder = os.path.dirname(checkpoints)
    is_in_run = os.path.basename(checkpoints) == "checkpoints" and os.path.exists(os.path.join(folder, "run.json"))
    return folder if is_in_run else None


def make_card(checkpoint: str, card: Card) -> str:
    """The text of README.md."""
    folder = run_folder_of(checkpoint)
    state, model = (read_json(os.path.join(checkpoint, name)) for name in ("training_state.json", "config.json"))
    state["config"] = dataclasses.asdict(read_config(checkpoint))  # with what an older version did not know
    run = read_json(os.path.join(folder, "run.json")) if folder else {}
    sessions = [session for session in run.get("sessions", []) if session["after_step"] < state["step"]]
    lines, held_out = (
        read_metrics(os.path.join(folder, f"{name}.jsonl")) if folder else [] for name in ("metrics", "held_out")
    )
    lines = [line for line in lines if line["step"] <= state["step"]]
    evaluated = [line for line in (state.get("best"), *held_out) if line and line["step"] == state["step"]]
    result = evaluated[-1] if evaluated else {}
    parts = {
        "What it is": what_it_is(checkpoint, state, model),
        "How to use it": how_to_use_it(model, card),
        "Training data": rows(training_data(state), "Data"),
        "Training procedure": rows(hyper_parameters(state["config"], use_of(model)), "Setting"),
        "Curve": f"![The training curve]({CURVE})" if folder and os.path.exists(os.path.join(folder, CURVE)) else "",
        "Results": results(result, state["config"]),
        "Hardware and software": rows(hardware(sessions), "Part"),
        "Throughput": throughput(lines),
        "Licence": f"`{card.license}`",
    }
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in parts.items() if text)
    # JSON is YAML, too.
    front = metadata(model, card, result, state["config"])
    head = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())
    return f"---\n{head}---\n\n# {card.name}\n{body}"


def metadata(model: Mapping, card: Card, result: Mapping, config: Mapping) -> Dict[str, Any]:
    """What stands before the text, for the hub."""
    use = use_of(model)
    values: Dict[str, Any] = {"license": card.license}
    if card.language:
        values["language"] = card.language
    if card.base_model:
        values["base_model"] = card.base_model
    values.update(library_name="transformers", tags=["bert", use.task, *(["onnx"] if card.onnx else [])])
    if use.has_pipeline_tag:
        values["pipeline_tag"] = use.task
    if result:
        metrics = [
            {"type": HUB_METRICS.get(name, name), "value": value, "name": words}
            for name, words, value in figures(result)
        ]
        data = {"type": "held-out", "name": held_out_files(config) or "held-out samples"}
        values["model-index"] = [
            {"name": card.name, "results": [{"task": {"type": use.task}, "dataset": data, "metrics": metrics}]}
        ]
    return values


def what_it_is(checkpoint: str, state: Mapping, model: Mapping) -> str:
    parameters = sum(shape.numel() for shape in open_weights(checkpoint).shapes.values())
    layers, heads = (model[f"num_{name}"] for name in ("hidden_layers", "attention_heads"))
    text, training = state.get("data_set", {}).get("tokenizer"), state["config"]["training"]
    return (
        f"A BERT, `{model['architectures'][0]}` in transformers: {count_of(layers, 'layer')} of "
        f"{model['hidden_size']:,}, {count_of(heads, 'attention head')}, {parameters:,} parameters, a vocabulary of "
        f"{model['vocab_size']:,} tokens{f' ({rules_in_words(text)})' if text else ''}, sequences of up to "
        f"{model['max_position_embeddings']:,} tokens. These are its weights after step {state['step']:,} of "
        f"{training['max_steps']:,}, trained on {state['samples_seen']:,} samples by bert-pretraining, from "
        f"{what_it_began_with(training)}."
    )


def what_it_began_with(training: Mapping) -> str:
    if training["branch_from"]:  # start_from is null then: how the other run began is not known here
        return f"the state of another run, `{without_folders(training['branch_from'])}`"
    return f"the weights of `{model_of(training['start_from'])}`" if training["start_from"] else "random weights"


def model_of(path: str) -> str:
    """The last part of a model's path; of a checkpoint the run and the step, as training.branch_from has it."""
    run, checkpoints, name = ["", "", *path.rstrip("/").split("/")][-3:]
    step = re.fullmatch(r"step_0*(\d+)", name)
    return f"{run}@{step[1]}" if step and run and checkpoints == "checkpoints" else without_folders(path)


def how_to_use_it(model: Mapping, card: Card) -> str:
    code = use_of(model).code.replace("NAME", json.dumps(card.place))
    onnx = (
        f"\n\n`{card.onnx}` is the same for ONNX Runtime, for any number and length of sequences. It takes "
        "`input_ids`, `attention_mask` (1 for tokens, 0 for padding) and `token_type_ids`."
    )
    return f"```python\n{code}\n```{onnx if card.onnx else ''}"


def training_data(state: Mapping) -> Dict[str, Any]:
    data, shards = state["config"]["data"], state.get("data_set", {}).get("shards", [])
    return {
        "text": without_folders(data["text"]),
        "files": without_folders(data["files"]),
        "samples": f"{sum(count for _, count in shards):,} in {count_of(len(shards), 'file')}" if shards else None,
        "held out": held_out_files(state["config"]),
    }


def held_out_files(config: Mapping) -> str:
    return without_folders(config["data"]["held_out_files"])


def hyper_parameters(config: Mapping, use: Use) -> Dict[str, Any]:
    """By dotted key; of the task what is not as usual."""
    usual, own = dataclasses.asdict(TaskConfig()), config["task"]
    task = [key for key in own if key == "name" or (key not in NOT_OF_TASK and own[key] != usual[key])]
    shown = {f"task.{key}": own[key] for key in task}
    for section, keys in HYPER_PARAMETERS.items():
        shown.update({f"{section}.{key}": config[section][key] for key in keys})
    if use is not FILL_MASK:
        del shown["data.mask_tokens"]
    start = shown["training.start_from"]
    return {f"`{key}`": value for key, value in {**shown, "training.start_from": start and model_of(start)}.items()}


def results(result: Mapping, config: Mapping) -> str:
    if not result:
        return ""
    table = rows({words: f"{value:g}" for _, words, value in figures(result)}, "Metric")
    files = f" (`{held_out_files(config)}`)" if held_out_files(config) else ""
    return f"On {result['samples']:,} held-out samples{files}, after step {result['step']:,}:\n\n{table}"


def figures(result: Mapping) -> List[Tuple[str, str, float]]:
    """The metrics of a line of held_out.jsonl: name, name in words, value; not the only part of the loss, which is the
    loss, nor thresholds."""
    values = {name: value for name, value in result.items() if isinstance(value, float) and math.isfinite(value)}
    repeated = [name for name in values if name.endswith("_loss") and values[name] == values.get("loss")]
    shown = [name for name in values if name not in repeated and not name.endswith("_thresh")]
    return [(name, name.replace("_", " "), round(values[name], 4)) for name in shown]


def hardware(sessions: Sequence[Mapping]) -> Dict[str, Any]:
    """Where the run was, and by what; without the reason why a device was not another."""
    devices = [re.sub(r": [^()]*\)$", ")", session["device"]) for session in sessions]
    described = [
        f"{device}, {session['processor']}, {count_of(session['processes'], 'process', 'processes')}"
        for device, session in zip(devices, sessions)
    ]
    versions = [", ".join(f"{name} {number}" for name, number in s["versions"].items()) for s in sessions]
    return {"device": "; ".join(dict.fromkeys(described)), "software": "; ".join(dict.fromkeys(versions))}


def throughput(lines: Sequence[Mapping]) -> str:
    """The median of the lines of metrics.jsonl, and the time of all steps."""
    rates = [line["sequences_per_second"] for line in lines]
    if not rates:
        return ""
    seen = [line["samples_seen"] for line in lines]
    counts = [after - before for before, after in zip(seen, seen[1:])]
    counts.insert(0, min([seen[0], *counts[:1]]))  # a branch begins with those of another run
    seconds = sum(count / rate for count, rate in zip(counts, rates))
    return f"{statistics.median(rates):,.1f} sequences/s (median), {duration(seconds)} in all."


def rows(values: Mapping[str, Any], heading: str) -> str:
    """A table; what is None or empty has no row."""
    shown = {name: value for name, value in values.items() if value not in (None, "", [])}
    lines = [f"| {name} | {cell(value)} |\n" for name, value in shown.items()]
    return "".join([f"| {heading} | |\n|---|---|\n", *lines]).rstrip() if shown else ""


def cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([|*])", r"\\\1", text).replace("\n", " ")


def without_folders(value: Any) -> Any:
    """Of a path or URL its last part, of several those of each in one text; None of None."""
    if isinstance(value, list):
        return ", ".join(map(without_folders, value))
    return value and base_name(value.rstrip("/"))
