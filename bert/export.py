"""Makes a folder for transformers of any checkpoint: `python -m bert.export --help` tells how."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import Dict, Optional, Sequence

from bert.errors import OnnxDiffers
from data.commands import check_options, option, parse_options, run_command, table
from data.errors import InputError
from data.files import flush_to_disk, read_json

__all__ = ["ExportOptions", "export", "main"]

FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")  # beside model.safetensors
CONFIG, STATE = FILES[0], "training_state.json"
CARD, ONNX = "README.md", "onnx/model.onnx"

EXAMPLES = """examples:
  python -m bert.export runs/pod16_phase1/checkpoints/step_00007038 my-bert --license apache-2.0
  python -c 'import transformers; transformers.AutoModel.from_pretrained("my-bert")'
  python -m bert.export runs/tr/checkpoints/step_00010000 bert-tr --license mit --language tr --push me/bert-tr"""


@dataclass
class ExportOptions:
    """Makes a folder for transformers of a checkpoint, of one process or of many: weights, config, tokenizer, and a
    README.md for the Hugging Face hub that is filled in from the run. Paths, machine names and commands of the run stay
    out of it."""

    checkpoint: str = option(flag="checkpoint")
    """a folder step_<number> in a run's folder checkpoints/"""
    out: str = option(flag="out")
    """the folder to make"""
    license: Optional[str] = option(
        None,
        lambda name: name and name == name.lower() and not set(name) & set(" /\\\n"),
        "the hub's name of a licence, such as apache-2.0",
        metavar="NAME",
    )
    """what others may do with the weights, by the hub's name of a licence: apache-2.0, mit, cc-by-sa-4.0, other ...
    Must be given"""
    language: str = option(
        "",
        lambda code: bool(re.fullmatch(r"([A-Za-z]{2,3}(-\w+)*)?", code)),
        "a code such as tr or pt-BR",
        metavar="CODE",
    )
    """of the text, by its code, such as en or tr"""
    name: str = option("", metavar="NAME")
    """the model's, in its README.md (default: that of the folder, or of the repository)"""
    base_model: str = option("", metavar="USER/NAME")
    """the model on the hub that the run started from, for the model card"""
    onnx: bool = option(False)
    """write onnx/model.onnx, too, for ONNX Runtime, and check it; needs onnx, onnxscript and onnxruntime"""
    push: str = option("", metavar="USER/NAME")
    """upload the folder to this repository of the hub, which is made if it is not there; needs huggingface_hub, and its
    token, from HF_TOKEN or `hf auth login`"""
    private: bool = option(False)
    """a repository that --push makes is private"""


def export(options: ExportOptions) -> str:
    """Makes the folder, which appears whole or not at all, and returns a report.

    Weights pass through memory tensor by tensor, but for `onnx`. Raises InputError for what is no checkpoint or cannot
    be read, where the folder is there already, without a licence, and where a package that is needed is missing;
    OnnxDiffers where ONNX Runtime computes something else; OSError where the upload fails, after the folder is made.
    """
    from bert.exporting.hub import check_can_upload, upload  # here, for torch takes seconds to import

    check(options)
    if options.push:
        check_can_upload(options.push)
    out = os.path.normpath(options.out)
    temporary = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        report = write_files(options, os.path.basename(out), temporary)
        for place, _, names in os.walk(temporary):
            for name in names:
                shutil.copymode(os.path.join(temporary, CONFIG), os.path.join(place, name))
                flush_to_disk(os.path.join(place, name))
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows = {name: text.replace(temporary, out) for name, text in report.items()}
    rows["load it"] = f"AutoModel.from_pretrained({out!r})"
    if options.push:
        rows["uploaded"] = upload(out, options.push, options.private)
    return table(rows)


def check(options: ExportOptions) -> None:
    """Raises InputError for what cannot be exported, before anything is written."""
    check_options(options)
    checkpoint, out = options.checkpoint, os.path.normpath(options.out)
    missing = [name for name in (*FILES, STATE) if not os.path.exists(os.path.join(checkpoint, name))]
    if missing:
        raise InputError(f"{os.path.join(checkpoint, missing[0])}: no such file; expected the folder of a checkpoint")
    if options.license is None:
        raise InputError(
            "--license is missing: it says what others may do with the weights, such as --license apache-2.0, or "
            "--license other. The licences of the text and of weights that the run began with may have a say in it"
        )
    if options.private and not options.push:
        raise InputError("--private is about a repository that --push makes; expected --push USER/NAME with it")
    if os.path.exists(out):
        raise InputError(f"{out}: is there already, and nothing is overwritten. Choose another name")
    if options.onnx:
        from bert.exporting.onnx_file import check_can_write

        check_can_write(read_json(os.path.join(checkpoint, CONFIG))["architectures"][0])


def write_files(options: ExportOptions, folder_name: str, folder: str) -> Dict[str, str]:
    """Writes what `options` ask for into `folder`, and returns rows of the report."""
    from bert.exporting.model_card import CURVE, Card, make_card, run_folder_of
    from bert.run.sharded_checkpoint import write_model

    checkpoint = options.checkpoint
    for name in FILES:
        shutil.copyfile(os.path.join(checkpoint, name), os.path.join(folder, name))
    run = run_folder_of(checkpoint)
    if run and os.path.exists(os.path.join(run, CURVE)):
        shutil.copyfile(os.path.join(run, CURVE), os.path.join(folder, CURVE))
    model = os.path.join(folder, "model.safetensors")
    write_model(checkpoint, model)
    report = {"weights": f"{model}, {os.path.getsize(model) / 1e6:,.1f} MB"}
    if options.onnx:
        difference = write_onnx_of(checkpoint, os.path.join(folder, ONNX))
        report["onnx"] = f"{os.path.join(folder, ONNX)}, differs from the model by {difference:.1g} at most"
    name = options.name or options.push.rpartition("/")[2] or folder_name
    card = Card(
        name,
        options.push or folder_name,
        options.license or "",
        options.language,
        options.base_model,
        ONNX if options.onnx else "",
    )
    with open(os.path.join(folder, CARD), "w", encoding="utf-8") as file:
        file.write(make_card(checkpoint, card))
    return {**report, "model card": os.path.join(folder, CARD)}


def write_onnx_of(checkpoint: str, path: str) -> float:
    from bert.exporting.onnx_file import write_onnx
    from bert.run.inference import load_model
    from bert.run.state import read_config

    os.makedirs(os.path.dirname(path))
    config = read_json(os.path.join(checkpoint, CONFIG))
    return write_onnx(load_model(checkpoint, read_config(checkpoint).task), config["architectures"][0], config, path)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command and returns its exit status."""
    command = parse_options(ExportOptions, arguments, "bert.export", EXAMPLES)
    return run_command(lambda: print(export(command)), failures=(OnnxDiffers,))


if __name__ == "__main__":
    sys.exit(main())
