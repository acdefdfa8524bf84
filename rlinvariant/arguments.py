"""Command lines with options: argparse, with a mistake as one line."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from rlinvariant.errors import UserError


class Parser(argparse.ArgumentParser):
    """Of `rlinvariant COMMAND`. Raises UserError where argparse would print its usage and exit."""

    def __init__(self, command: str, description: str) -> None:
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(f"rlinvariant {command}", description=description, allow_abbrev=False, formatter_class=form)
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.command}: {message}; see rlinvariant {self.command} --help")


def at_least(least: float) -> Callable[[str], int]:
    """A whole number of at least so much, as argparse's `type`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}")
        return int(text)

    return number


def temperature(text: str) -> float:
    """At least 0.01, to which vLLM raises smaller ones."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 0.01")
    return value
