"""What command lines share: argparse with a mistake as one line, and names of models."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
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


def model_problems(key: str, model: str) -> list[str]:
    """Why a model cannot be read, in one line, known without the hub: `key=model` must be a whole model's directory, or look
    like a hub id."""
    path = Path(model)
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return [f"{key}={model}: expected a whole model, found a PEFT adapter; merge it (merge_and_unload) first"]
        if not (path / "config.json").exists():
            return [f"{key}={model}: expected a Hugging Face model directory, found no config.json in it"]
        return []
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not path.parent.is_dir() and not path.exists():
        return []
    fix = "write its path without ~" if model.startswith("~") else "give a Hugging Face model directory or a hub id ORG/NAME"
    return [f"{key}={model}: no such directory; {fix}"]
