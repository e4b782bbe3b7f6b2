"""The command line: a config file, and dotted overrides. `python -m bert.command_line --schema` prints a file's schema.

jsonargparse parses options, converts values and prints the whole config. What it does not do well is done here: options
override the file wherever --config stands, errors name the source, the key, its value and what is expected, and --help
has a line for each option.
"""

import argparse
import difflib
import json
import math
import operator
import os
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any, Dict, Iterable, List, Literal, Optional, Sequence, Tuple, Union, get_args, get_origin

from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_dumper

from bert.config import Config
from bert.start_from import defaults_of_start
from bert.validation import validate
from data.errors import InputError
from data.examples.glue import glue_files

__all__ = ["CONFIG_FOLDER", "SUITE", "help_lines_of", "find_config", "make_schema", "parse_command_line"]

CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")
FOLDERS = (CONFIG_FOLDER, *(os.path.join(CONFIG_FOLDER, name) for name in ("glue", "ipu")))
IPU_FLAGS = ("compile_only", "ipu_model")
FLAGS = ("plan", *IPU_FLAGS)
FILE_KEYS = {
    "$schema": "The JSON schema that editors complete and check this file with.",
    "base": "The config that this file changes, which has no base itself: its path from here, or a name in configs/.",
}
SUITE = "configs"
SUITE_HELP = "Configs that run_finetuning.py trains one after the other. A file that lists some has nothing else."
SECTIONS: Dict[str, Any] = {field.name: field.type for field in fields(Config) if is_dataclass(field.type)}
TYPES: Dict[str, Any] = {field.name: field.type for field in fields(Config) if field.name not in SECTIONS}
for section, kind in SECTIONS.items():
    TYPES.update({f"{section}.{field.name}": field.type for field in fields(kind)})

WHERE_LISTED = "`--help` lists the options, `--help-ipu` those for IPUs"
WIDTH = 110  # of what --help wraps
INDENT = " " * 6
COMMANDS = """\
A small BERT of the English text that Python brings, in a minute:
  python run_pretraining.py --config quickstart.json
A BERT of your text, with a vocabulary of its own (one sentence or paragraph a line, a blank line between documents):
  python run_pretraining.py --config cpu_small.json --data.text 'corpus/*.txt'
A BERT of transformers, or a checkpoint, adapted to your text:
  python run_pretraining.py --training.start_from FOLDER --data.text 'corpus/*.txt' --training.max_steps 1000

--config is a JSON file of these settings, or the name of one in configs/; options override it. --print_config prints
all settings as such a file. --help-SECTION, such as --help-optimizer, says more; settings for IPUs are in --help-ipu.
"""

# The JSON schema's words for types and for the comparisons of restricted types, each with the words of messages.
JSON_TYPES = {
    bool: ("boolean", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    str: ("string", "a string"),
    type(None): ("null", "null"),
}
BOUNDS = {
    operator.gt: ("exclusiveMinimum", "above"),
    operator.ge: ("minimum", "at least"),
    operator.lt: ("exclusiveMaximum", "below"),
    operator.le: ("maximum", "at most"),
}


def parse_command_line(arguments: Sequence[str]) -> Config:
    """`--config NAME_OR_PATH` and dotted overrides -> a valid Config. A bare name is looked for here, then in configs/.

    --help, --help-SECTION and --print_config print and raise SystemExit. Raises InputError that names the file or the
    command line, the key, its value and what is expected.
    """
    show_help(arguments)
    parser, (name, options) = make_parser(), take_config(arguments)
    source = find_config(name) if name else "command line"
    in_file = read_config(parser, source) if name else {}
    others = [option for option in options if not option.startswith("--print_config")]
    said = vars(parse(parser, others, defaults=False).as_flat())
    both = {**in_file, **said}
    output = both.get("training.output") or default_output(name)
    if both.get("training.start_from") and not both.get("training.branch_from"):
        defaults = defaults_of_start(in_file, said, output, source)
        parser.set_defaults({key: value for key, value in defaults.items() if key in TYPES})
    parser.set_defaults(in_file)
    parsed = parse(parser, options).as_dict()
    del parsed["config"]
    values: Dict[str, Any] = json.loads(json.dumps(parsed))  # plain numbers in place of restricted types
    config = Config(**{key: SECTIONS[key](**value) if key in SECTIONS else value for key, value in values.items()})
    config.training.output = output
    complete_data(config)
    validate(config, source)
    return config


def complete_data(config: Config) -> None:
    """Makes lists of single paths; shards made from text go into the run's folder, where nothing else is said."""
    data, task, folder = config.data, config.task, os.path.join(config.training.output, "data")
    for key in ("files", "held_out_files", "text"):
        value = getattr(data, key)
        setattr(data, key, [value] if isinstance(value, str) else value)
    if task.glue and not data.files:
        data.files, data.held_out_files = glue_files(task.folder, task.glue)
    if data.text and not data.files:
        data.files = [os.path.join(folder, "train-*.h5")]
    if data.text and data.held_out and not data.held_out_files:
        data.held_out_files = [os.path.join(os.path.dirname(data.files[0]), "held_out-*.h5")]


def default_output(name: Optional[str]) -> str:
    return os.path.join("runs", os.path.splitext(os.path.basename(name or "run"))[0])


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, parser_mode="json", allow_abbrev=False, add_help=False)
    set_dumper("json", lambda values: json.dumps(values, indent=2) + "\n")  # what --print_config prints
    parser.add_argument("--config", action=ActionConfigFile)  # which adds --print_config
    parser.add_class_arguments(Config, skip=set(FLAGS))
    for flag in FLAGS:
        spellings = dict.fromkeys((f"--{flag.replace('_', '-')}", f"--{flag}"))
        parser.add_argument(*spellings, type=bool, nargs="?", const=True, default=False)
    return parser


def parse(parser: ArgumentParser, options: Sequence[str], defaults: bool = True) -> Namespace:
    try:
        return parser.parse_args(options, defaults=defaults)
    except ArgumentError as error:
        raise InputError(f"command line: {explain(parser, options, error)}")


def take_config(arguments: Sequence[str]) -> Tuple[Optional[str], List[str]]:
    """What --config names, and the arguments without it: the file is under them wherever it stands."""
    names, others, rest = [], [], iter(arguments)
    for argument in rest:
        option, separator, value = argument.partition("=")
        if option == "--config":
            names.append(value if separator else next(rest, "nothing"))
        else:
            others.append(argument)
    if len(names) > 1:
        raise InputError(f"command line: --config is given twice: {', '.join(names)}. Name one; options override it")
    return (names[0] if names else None), others


def show_help(arguments: Sequence[str]) -> None:
    """For --help prints each setting in a line, for --help-SECTION all that is said of those of a section, and
    exits."""
    for argument in arguments:
        if argument in ("-h", "--help"):
            print("\n".join([COMMANDS, *help_lines("")]))
        elif argument[len("--help-") :] in SECTIONS and argument.startswith("--help-"):
            print("\n".join(full_help_lines(argument[len("--help-") :])))
        else:
            continue
        raise SystemExit(0)


def help_lines(section: str) -> List[str]:
    """The settings of a section, or of the whole with its sections but ipu: each default, and the first sentence."""
    kind = SECTIONS.get(section, Config)
    texts = {key: text for key, text in documentation_of(kind).items() if key not in IPU_FLAGS}
    begin = f"  --{section}." if section else "  --"
    rows = {f"{begin}{key} {written(getattr(kind(), key))}": text for key, text in texts.items()}
    width = max(map(len, rows)) + 2
    lines = [f"{row:{width}}{text.partition('. ')[0].rstrip('.')}" for row, text in rows.items()]
    if section:
        return ["", *textwrap.wrap(f"{section}: {one_line(kind.__doc__)}", WIDTH), *lines]
    return [*lines, *(line for name in SECTIONS if name != "ipu" for line in help_lines(name))]


def help_lines_of(keys: Sequence[str]) -> List[str]:
    """The first sentence about each of some settings, by dotted key."""
    texts = {key: documentation_of(SECTIONS.get(key.rpartition(".")[0], Config))[key.split(".")[-1]] for key in keys}
    return [f"  --{key:{max(map(len, keys))}}  {text.partition('. ')[0].rstrip('.')}" for key, text in texts.items()]


def full_help_lines(section: str) -> List[str]:
    kind, lines = SECTIONS[section], []
    if section == "ipu":
        lines = [f"  --{flag}\n      {documentation_of(Config)[flag]}" for flag in IPU_FLAGS]
    for key, text in documentation_of(kind).items():
        kinds, default = read_type(kind.__annotations__[key])[1], written(getattr(kind(), key))
        words = f"{text} ({kinds}{default and '; by default '}{default})"
        lines += [f"  --{section}.{key}", *textwrap.wrap(words, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)]
    return [*textwrap.wrap(f"{section}: {one_line(kind.__doc__)}", WIDTH), *lines]


def written(value: Any) -> str:
    return "" if value is None or value == "" else value if isinstance(value, str) else json.dumps(value)


def config_names() -> str:
    files = {name for folder in FOLDERS for name in os.listdir(folder) if name.endswith(".json")}
    return ", ".join(sorted(files - {"schema.json"}))


def find_config(name: str, based: str = "") -> str:
    """The path of a config: `name` is a path, from the folder of the file `based` on it, or a bare name in configs/."""
    candidates = [os.path.join(os.path.dirname(based), name)]
    candidates += [os.path.join(folder, name + ending) for folder in FOLDERS for ending in ("", ".json")]
    if os.path.dirname(os.path.abspath(candidates[0])) == CONFIG_FOLDER:  # where the PODs' configs were before
        candidates.append(os.path.join(CONFIG_FOLDER, "ipu", os.path.basename(name)))
    for path in candidates:
        if os.path.isfile(path):
            return os.path.relpath(path) if os.path.isabs(path) and not os.path.isabs(name) else path
    sought, where = (f"{based}: base is {json.dumps(name)}", "beside it") if based else (name, "here")
    raise InputError(f"{sought}: no such config, {where} or in configs/, which has: {config_names()}")


def read_config(parser: ArgumentParser, path: str, based: str = "") -> Dict[str, Any]:
    """The values of a config file over those of its base, by dotted key; `based` is the file whose base this one is."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}")
    if isinstance(content, dict) and SUITE in content:
        raise InputError(
            f"{path}: lists configs, {', '.join(map(str, content[SUITE]))}. Train them by run_finetuning.py"
        )
    values = flatten(content, path)
    own = {key: value for key, value in values.items() if key in TYPES}
    for key, value in {} if accepts(parser, own) else own.items():
        if not accepts(parser, {key: value}):
            raise InputError(f"{path}: {key} is {json.dumps(value)}, expected {read_type(TYPES[key])[1]}")
    base = values.get("base", "")
    if not isinstance(base, str) or (base and based):
        expected = f"none, as {based} is based on this file" if based else "the path or name of a config"
        raise InputError(f"{path}: base is {json.dumps(base)}, expected {expected}")
    return {**read_config(parser, find_config(base, path), path), **own} if base else own


def flatten(content: Any, path: str, section: str = "") -> Dict[str, Any]:
    """What a config file holds, by dotted key; raises InputError for a key that does not exist."""
    if not isinstance(content, dict):
        where = section.rstrip(".") or "the file"
        raise InputError(f"{path}: {where} is {json.dumps(content)}, expected an object of keys and values")
    flat: Dict[str, Any] = {}
    known = [key for key in (*TYPES, *SECTIONS, *FILE_KEYS) if key.rpartition(".")[0] == section.rstrip(".")]
    for name, value in content.items():
        key = section + name
        if key not in known:
            names = ", ".join(other[len(section) :] for other in known)
            raise InputError(f"{path}: unknown key {key}; {did_you_mean(key, known)}expected one of {names}")
        flat.update(flatten(value, path, f"{key}.") if key in SECTIONS else {key: value})
    return flat


def accepts(parser: ArgumentParser, values: Dict[str, Any]) -> bool:
    try:
        parser.parse_object(values)
    except ArgumentError:
        return False  # and null, which jsonargparse takes for anything:
    return all(value is not None or type(None) in get_args(TYPES[key]) for key, value in values.items())


def explain(parser: ArgumentParser, arguments: Sequence[str], error: ArgumentError) -> str:
    """What is wrong with a refused command line: the first wrong option, or else jsonargparse's own words."""
    for argument, following in zip(arguments, [*arguments[1:], "nothing"]):
        option, separator, value = argument.partition("=")
        key, value = option[2:], value if separator else following
        if "Unrecognized arguments" in str(error) and argument in str(error).split() and option.startswith("--"):
            return f"unknown option {option}; {did_you_mean(key, TYPES)}{WHERE_LISTED}"
        if key in TYPES and key not in FLAGS and not accepts(parser, {key: value}):
            return f"{key} is {value}, expected {read_type(TYPES[key])[1]}"
    hint = f"Quote a pattern, so that the shell leaves it as it is; {WHERE_LISTED}"
    return f"{one_line(str(error))}. {hint}"


def did_you_mean(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def make_schema() -> Dict[str, Any]:
    """The JSON schema of config files: keys with their descriptions, types, bounds and defaults."""
    schema = schema_of(Config)
    schema["properties"].update({key: {"description": text, "type": "string"} for key, text in FILE_KEYS.items()})
    schema["properties"][SUITE] = {"description": SUITE_HELP, "type": "array", "items": {"type": "string"}}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Config of run_pretraining.py", **schema}


def schema_of(kind: Any) -> Dict[str, Any]:
    keys = {key: schema_of(section) for key, section in SECTIONS.items() if kind is Config}
    for key, text in documentation_of(kind).items():
        keys[key] = {"description": text, **read_type(kind.__annotations__[key])[0], "default": getattr(kind(), key)}
    return {"description": one_line(kind.__doc__), "type": "object", "properties": keys, "additionalProperties": False}


def read_type(kind: Any) -> Tuple[Dict[str, Any], str]:
    """What a field's type admits, as a JSON schema and in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}, f"one of {', '.join(arguments)}"
    if origin in (Union, list, dict):
        schemas, words = zip(*(read_type(argument) for argument in arguments))
        if origin is Union:
            return {"anyOf": list(schemas)}, " or ".join(words)
        if origin is list:
            return {"type": "array", "items": schemas[0]}, f"a list, each element {words[0]}"
        return {"type": "object", "additionalProperties": schemas[1]}, f"an object, each value {words[1]}"
    name, noun = next(names for python, names in JSON_TYPES.items() if issubclass(kind, python))
    limits = [(*BOUNDS[compare], bound) for compare, bound in getattr(kind, "_restrictions", ()) if bound < math.inf]
    words = [noun, " and ".join(f"{word} {bound}" for _, word, bound in limits)]
    return {"type": name, **{keyword: bound for keyword, _, bound in limits}}, " ".join(words).strip()


def documentation_of(kind: Any) -> Dict[str, str]:
    return {field.arg_name: one_line(field.description) for field in parse_from_object(kind).params}


def one_line(text: Optional[str]) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Prints the JSON schema of config files.")
    options.add_argument("--schema", action="store_true", required=True, help="print it")
    options.parse_args()
    print(json.dumps(make_schema(), indent=2))
