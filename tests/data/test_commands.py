from dataclasses import dataclass
from typing import List, Optional

import pytest

from bert.errors import Diverged
from bert.signals import Stop
from data.commands import check_options, option, parse_options, run_command
from data.errors import InputError, LoaderDied, PrepareStopped


@pytest.mark.parametrize(
    "error, status, line",
    [
        (InputError("a: bad"), 2, "error: a: bad"),
        (OSError("disk full"), 1, "error: disk full"),
        (LoaderDied("gone"), 1, "error: gone"),
        (PrepareStopped("gone"), 1, "error: gone"),
        (Diverged("nan"), 1, "error: nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stop(15), 143, "interrupted"),
    ],
)
def test_an_error_becomes_an_exit_status_and_one_line(capsys, error, status, line):
    def command():
        raise error

    assert run_command(command, failures=(Diverged,)) == status
    assert capsys.readouterr().err == line + "\n"
    advised = {2: line, 1: f"stopped: {error}. Go on"}.get(status, "interrupted: Go on")
    assert run_command(command, "Go on", (Diverged,)) == status
    assert capsys.readouterr().err == advised + "\n"


def test_other_errors_are_raised_and_success_is_0():
    with pytest.raises(Diverged):
        run_command(lambda: (_ for _ in ()).throw(Diverged("nan")))
    assert run_command(lambda: "a result") == 0


@dataclass
class Options:
    """Does a thing."""

    files: List[str] = option(flag="files")
    """what to read, 100 % of it,
    in two lines"""
    folder: str
    """where to write"""
    kind: str = option("plain", choices=("plain", "fine"), flag="--as")
    """how"""
    block_size: int = option(3, lambda size: size > 0, "1 or more")
    """how many"""
    share: Optional[float] = option(None, lambda share: share < 1, "less than 1")
    """how much"""
    fast: bool = False
    """at once"""
    safe: bool = True
    """with care"""


def test_a_dataclass_is_the_command_line():
    assert parse_options(Options, ["a", "b", "--folder", "c"], "x.y") == Options(["a", "b"], "c")
    given = ["--folder", "c", "--as", "fine", "--block-size", "5", "--share", "0.5", "--safe", "false", "--fast", "a"]
    assert parse_options(Options, given, "x.y") == Options(["a"], "c", "fine", 5, 0.5, True, False)


@pytest.mark.parametrize("wrong", [["--as", "odd"], ["--safe", "maybe"], ["--block-size", "x"], ["--other"]])
def test_a_command_line_that_does_not_parse_exits_2(wrong):
    with pytest.raises(SystemExit) as exit:
        parse_options(Options, ["a", "--folder", "c", *wrong], "x.y")
    assert exit.value.code == 2
    with pytest.raises(SystemExit):
        parse_options(Options, ["a"], "x.y")


def test_a_switch_that_is_neither_true_nor_false_is_told_so(capsys):
    with pytest.raises(SystemExit):
        parse_options(Options, ["a", "--folder", "c", "--safe", "maybe"], "x.y")
    assert "argument --safe: 'maybe', expected true or false" in capsys.readouterr().err


def test_help_is_the_docstrings_with_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"], "x.y", "examples:\n  run it")
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m x.y" in shown and "Does a thing." in shown and shown.endswith("examples: run it")
    assert "what to read, 100 % of it, in two lines" in shown and "--block-size N how many (default 3)" in shown
    assert "--share SHARE how much" in shown and "--safe true|false with care (default true)" in shown


def test_a_value_that_an_option_may_not_have_is_named():
    for value, message in (
        (dict(block_size=0), "--block-size is 0, expected 1 or more"),
        (dict(kind="odd"), "--as is odd, expected plain or fine"),
        (dict(share=1.5), "--share is 1.5, expected less than 1"),
    ):
        with pytest.raises(InputError, match=message):
            check_options(Options(["a"], "b", **value))
    check_options(Options(["a"], "b"))


KINDS = {"plain": 1}


@dataclass
class OpenOptions:
    """Choices that others may add to."""

    kind: str = option("plain", choices=KINDS)
    """how"""


def test_a_choice_that_was_added_later_is_allowed_and_named(monkeypatch):
    monkeypatch.setitem(KINDS, "odd", 2)
    check_options(OpenOptions("odd"))
    with pytest.raises(InputError, match="--kind is other, expected plain or odd"):
        check_options(OpenOptions("other"))
