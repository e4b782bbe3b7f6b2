"""What the commands share: options as the fields of a dataclass, errors as exit statuses, reports as tables."""

import argparse
import ast
import dataclasses
import inspect
import signal
import sys
import typing
from typing import Any, Callable, Collection, Dict, Optional, Sequence, Tuple, Type, TypeVar

from data.errors import InputError, LoaderDied, PrepareStopped

__all__ = ["check_options", "option", "parse_options", "run_command", "table"]

Options = TypeVar("Options")
METAVARS = {int: "N", float: "SHARE", str: "PATH", bool: "true|false"}


def run_command(command: Callable[[], object], advice: str = "", failures: Tuple[Type[Exception], ...] = ()) -> int:
    """Runs a command and returns its exit status; an error becomes one line on stderr.

    0: it ended. 2: what the user gave cannot be used (InputError). 1: it failed (OSError, LoaderDied, PrepareStopped,
    or one of `failures`). 128 + the signal's number, 130 for Ctrl-C: it was interrupted. `advice` is what to do after a
    failure or an interrupt.
    """
    failures = (OSError, LoaderDied, PrepareStopped, *failures)
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"stopped: {error}. {advice}" if advice else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {advice}" if advice else "interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "signal_number", signal.SIGINT)
    return 0


def option(
    default: Any = dataclasses.MISSING,
    allowed: Callable[[Any], bool] = lambda value: True,
    expected: str = "",
    choices: Collection[str] = (),
    flag: str = "",
    metavar: str = "",
    off: str = "",
) -> Any:
    """A field of a dataclass of options. The docstring under it is its help.

    `allowed` tells which values it may have, `expected` says so in words; `choices` are all that a string may be.
    `flag` is its name on the command line, by default `--` and the field's name; without dashes it is positional.
    `metavar` stands for its value in the help. `off` is a second flag, of an Optional[bool]: `flag` makes it true,
    `off` false.
    """
    metadata = {"allowed": allowed, "expected": expected, "choices": choices, "flag": flag, "metavar": metavar}
    metadata["off"] = off
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Raises InputError that names the first option whose value it may not have. None stands for a default."""
    for field in dataclasses.fields(options):
        value, settings = getattr(options, field.name), field.metadata
        if settings and value is not None:
            choices = settings["choices"]
            if not (value in choices if choices else settings["allowed"](value)):
                expected = " or ".join(choices) or settings["expected"]
                raise InputError(f"{flag_of(field)} is {value}, expected {expected}")


def parse_options(
    options: Type[Options], arguments: Optional[Sequence[str]], command: str, epilog: str = ""
) -> Options:
    """The options on the command line of `python -m COMMAND`, as an instance of a dataclass, unchecked.

    The dataclass's docstrings are the help. A list takes all values that follow; a bool that is false by default is a
    flag, one that is true takes `true` or `false`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=options.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types, docstrings = typing.get_type_hints(options), field_docstrings(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]  # mypy cannot tell that it is a dataclass
        off, docstring = field.metadata.get("off"), docstrings[field.name]
        if off:
            pair = parser.add_mutually_exclusive_group()
            help_of = {flag_of(field): docstring.replace("%", "%%"), off: f"the opposite of {flag_of(field)}"}
            for value, (flag, text) in zip((True, False), help_of.items()):
                pair.add_argument(flag, dest=field.name, action="store_const", const=value, help=text)
            continue
        parser.add_argument(flag_of(field), **argument_settings(field, types[field.name], docstring))
    return options(**vars(parser.parse_args(arguments)))


def argument_settings(field: "dataclasses.Field[Any]", kind: Any, docstring: str) -> Dict[str, Any]:
    """What argparse's `add_argument` takes for a field of this type."""
    settings: Dict[str, Any] = {"help": docstring.replace("%", "%%")}
    if flag_of(field).startswith("-"):
        settings.update(dest=field.name, required=field.default is dataclasses.MISSING)
    if field.default is False:
        return dict(settings, action="store_true")
    value_type = (typing.get_args(kind) or (kind,))[0]  # the first of List[str] or Optional[int]
    settings["type"] = true_or_false if value_type is bool else value_type
    if field.metadata.get("choices"):
        settings["choices"] = list(field.metadata["choices"])
    else:
        settings["metavar"] = field.metadata.get("metavar") or METAVARS[value_type]
    if typing.get_origin(kind) is list:
        settings["nargs"] = "+"
    if field.default not in (dataclasses.MISSING, None):
        settings["default"] = field.default
        settings["help"] += f" (default {str(field.default).lower()})"
    return settings


def flag_of(field: "dataclasses.Field[Any]") -> str:
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text.lower() == "true"


def field_docstrings(options: type) -> Dict[str, str]:
    """Field -> the string under it, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(options)).body
    statements = list(ast.iter_child_nodes(definition))
    return {
        field.target.id: " ".join(ast.literal_eval(docstring.value).split())
        for field, docstring in zip(statements, statements[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(docstring, ast.Expr)
    }


def table(rows: Dict[str, str]) -> str:
    """A command's report: what each row is about, and what it says."""
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
