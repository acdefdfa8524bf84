"""Parts that all commands share: a parser whose mistakes are one line, help texts, suggestions."""

import argparse
import difflib
import functools
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from rlinvariant.errors import UserError
from rlinvariant.text import shown
from rlinvariant.types import Untyped

WIDEST_HELP = 118  # columns


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Lays out help as wide as the terminal; examples keep their lines; None, False and "" are not shown as defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=help_width())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def help_width() -> int:
    """Return how many columns a help text may take in this terminal."""
    return min(shutil.get_terminal_size().columns - 2, WIDEST_HELP)


def wrapped(text: str, indent: str = "", hanging: str = "") -> str:
    """Fill each paragraph of `text` to the terminal's width, indented; all lines but its first by `hanging` instead."""
    fill = functools.partial(textwrap.fill, width=help_width(), initial_indent=indent, subsequent_indent=hanging or indent)
    return "\n\n".join(fill(" ".join(part.split())) for part in text.strip().split("\n\n"))


def definitions(rows: Mapping[str, str], columns: int) -> str:
    """List names with their meanings, for the description of a group of arguments; `columns` is the names' width."""
    return "\n".join(wrapped(text, f"{name:<{columns}} ", " " * (columns + 1)) for name, text in rows.items())


def suggestion(word: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean X?` for the option nearest to `word`, or nothing if none is as near as `cutoff` (0 to 1)."""
    close = difflib.get_close_matches(word, list(options), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


SCRIPT = "script"
"""Source, in config.json, of a value that a script has set."""


def given_by_user(source: object) -> bool:
    """Say whether a value of this source was written by the user, on the command line or in a file, and is no default."""
    return source == "command line" or (isinstance(source, str) and source.startswith("file "))


def twice(key: str, first: object, second: object) -> str:
    """Return the line that refuses a key which is given two values."""
    return f"{shown(key)}={shown(first)} and {shown(key)}={shown(second)}: both set the same value; keep one"


class CommandParser(argparse.ArgumentParser):
    """Parses `rlinvariant` and each of its commands. Raises UserError where argparse would print its usage and exit."""

    passes_on = ""
    """Name under which all arguments are handed on unread, for another program's parser; a plain --help is still ours."""

    def __init__(self, **options: Untyped) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, conflict_handler="resolve", **options)

    def parse_known_args(self, args: Untyped = None, namespace: Untyped = None) -> Untyped:
        if self.passes_on and list(args or [])[:1] not in ([], ["-h"], ["--help"]):
            return argparse.Namespace(**{self.passes_on: list(args)}), []
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('rlinvariant ')}: {message}; see {self.prog} --help")


def at_least(least: float) -> Callable[[str], int]:
    """Return an argparse `type` that reads a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}")
        return int(text)

    return number


def written(text: str) -> str:
    """Read a text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("empty; write a value, or leave the option out")
    return text


def temperature(text: str) -> float:
    """Read a temperature of 0.01, to which vLLM raises smaller ones, to 2, its greatest."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0.01 to 2")
    return value
