"""The commands of a page of docs/, run in this process."""

import importlib
import os
import re
import shlex
import sys
from typing import Dict, List

from tests import ROOT

__all__ = ["commands_of", "run_command_line"]


def commands_of(page: str, heading: str = "") -> List[List[str]]:
    """The words of the commands in the blocks under a heading, or before the first: `python ...`, on one line or more.
    The body of `for NAME in VALUES; do` is there once for each value."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        text = file.read()
    begin = text.index(f"\n## {heading}\n") if heading else 0
    text = text[begin : text.find("\n## ", begin + 1)]
    lines = "\n".join(line for line in text.split("\n") if line.startswith("    ")).replace("\\\n", "").split("\n")
    commands, loop = [], [("", "")]
    for line in map(str.strip, lines):
        begins = re.fullmatch(r"for (\w+) in (.*); do", line)
        if begins:
            loop = [(f"${begins[1]}", value) for value in begins[2].split()]
            body: List[str] = []
        elif line == "done":
            commands += [command.replace(name, value) for name, value in loop for command in body]
            loop = [("", "")]
        elif line.startswith("python "):
            (body if len(loop) > 1 else commands).append(line)
    return [shlex.split(command) for command in commands]


def run_command_line(words: List[str], changes: Dict[str, str]) -> None:
    """Runs `python FILE ...` or `python -m MODULE ...`; `changes` replaces the values of options, or adds options."""
    assert words[0] == "python"
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    for option, value in changes.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    name = module[: -len(".py")].replace("/", ".") if module.endswith(".py") else module
    before, sys.argv = sys.argv, [module, *arguments]
    try:
        status = importlib.import_module(name).main()
    finally:
        sys.argv = before
    assert not status, (words, status)
