"""Makes a folder for transformers of any checkpoint: `python -m bert.export --help` tells how."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Optional, Sequence

from data.commands import option, parse_options, run_command, table
from data.errors import InputError
from data.files import flush_to_disk

__all__ = ["ExportOptions", "export", "main"]

FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")  # beside model.safetensors

EXAMPLES = """examples:
  python -m bert.export runs/pod16_phase1/checkpoints/step_00007038 my-bert
  python -c 'import transformers; transformers.AutoModel.from_pretrained("my-bert")'"""


@dataclass
class ExportOptions:
    """Makes a folder for transformers of a checkpoint, of one process or of many: weights, config and tokenizer."""

    checkpoint: str = option(flag="checkpoint")
    """a folder step_<number> in a run's folder checkpoints/"""
    out: str = option(flag="out")
    """the folder to make"""


def export(options: ExportOptions) -> str:
    """Makes the folder, which appears whole or not at all, and returns a report.

    Weights pass through memory tensor by tensor. Raises InputError for what is no checkpoint or cannot be read, and
    where the folder is there already.
    """
    from bert.run.sharded_checkpoint import write_model  # here, for torch takes seconds to import

    checkpoint, out = options.checkpoint, os.path.normpath(options.out)
    missing = [name for name in FILES if not os.path.exists(os.path.join(checkpoint, name))]
    if missing:
        raise InputError(f"{os.path.join(checkpoint, missing[0])}: no such file; expected the folder of a checkpoint")
    if os.path.exists(out):
        raise InputError(f"{out}: is there already, and nothing is overwritten. Choose another name")
    temporary = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        for name in FILES:
            shutil.copyfile(os.path.join(checkpoint, name), os.path.join(temporary, name))
            flush_to_disk(os.path.join(temporary, name))
        model = os.path.join(temporary, "model.safetensors")
        write_model(checkpoint, model)
        size = os.path.getsize(model)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    loaded = f"AutoModel.from_pretrained({out!r})"
    return table({"weights": f"{os.path.join(out, 'model.safetensors')}, {size / 1e6:,.1f} MB", "load it": loaded})


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: print(export(parse_options(ExportOptions, arguments, "bert.export", EXAMPLES))))


if __name__ == "__main__":
    sys.exit(main())
