"""A recipe, and what `parse` makes of it: a configuration, or its mistakes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors

REPO = Path(__file__).parents[2]
RECIPE = """
import chz
from rlinvariant import config

DEFAULTS = {"steps": 7, "trainer.learning_rate": 1e-3, "data.size": 5}

@chz.chz
class Data(config.Data):
    size: int = 1
    path: str | None = None

def datasets(config, tokenizer): ...
def reward_funcs(config): return []
def prepare_model(config): return "made"
"""


def good(*argv: str, env: dict[str, str] | None = None) -> Config:
    """Parse arguments that are right."""
    return parse(["recipe=mine.py", *argv], env or {})


def with_defaults(argv: Sequence[str], *defaults: str) -> list[str]:
    """Return arguments, and those of `defaults` whose key they do not set: a key that is there twice is refused."""
    given = {argument.partition("=")[0] for argument in argv}
    return [*(default for default in defaults if default.partition("=")[0] not in given), *argv]


def errors(*argv: str, env: dict[str, str] | None = None) -> list[str]:
    """Parse arguments that are wrong, and return the lines that say so."""
    with pytest.raises(ConfigErrors) as raised:
        good(*argv, env=env)
    assert str(raised.value).splitlines() == raised.value.errors, "one line each"
    return raised.value.errors
