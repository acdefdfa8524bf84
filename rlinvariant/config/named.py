"""Functions and classes that the user names: `reward=`, `tools=` and `environment=`, FILE.py:NAME or MODULE:NAME."""

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlinvariant.arguments import suggestion
from rlinvariant.config.recipe import import_file, is_path, resolved
from rlinvariant.errors import UserError, located
from rlinvariant.text import shown

EXAMPLES = {"reward": "my_rewards.py:right", "tools": "my_tools.py:search", "environment": "my_game.py:Game"}
"""Key -> a value as a message shows one."""


@dataclass(frozen=True)
class Named:
    """Holds a function or a class, and the SHA-256 of the file that defines it, as hex."""

    value: Callable[..., Any]
    digest: str


@functools.cache
def named(key: str, name: str) -> Named:
    """Import what the value of a setting names. Modules of the working directory are found too.

    Args:
        key: the setting, one of `EXAMPLES`; a reward or a tool is no class.
        name: its value, or one of its values.

    Raises:
        UserError: the name has another form, there is no such file, module or function, or importing it fails.
    """
    place, _, attribute = name.rpartition(":")
    where, kind = f"{key}={shown(name)}", "NAME" if key == "environment" else "FUNCTION"
    if not place or not attribute.isidentifier():
        raise UserError(f"{where}: expected FILE.py:{kind} or MODULE:{kind}, such as {EXAMPLES[key]}")
    module = _imported(place, where)
    if not hasattr(module, attribute):
        functions = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise UserError(f"{where}: {shown(place)} has no `{attribute}`{suggestion(attribute, functions)}")
    value = getattr(module, attribute)
    if not callable(value) or (isinstance(value, type) and key != "environment"):
        expected = "a class, or a function that makes an environment" if key == "environment" else "a function"
        raise UserError(f"{where}: expected {expected}, found {type(value).__name__} {shown(value, 60)}")
    return Named(value, _digest(value, module))


def named_problems(key: str, names: Sequence[str]) -> list[str]:
    """Import what the values of a setting name, and list what is wrong with them, one line each."""
    problems = [f"{key}={shown(','.join(names))}: {name} is there twice; keep one" for name in twofold(names)]
    for name in dict.fromkeys(names):
        try:
            named(key, name)
        except UserError as error:
            problems.append(str(error))
    return problems


def twofold(names: Sequence[str]) -> list[str]:
    """Return the names that are there more than once."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _imported(place: str, where: str) -> ModuleType:
    if is_path(place):
        if not place.endswith(".py") or not os.path.isfile(resolved(place)):
            raise UserError(f"{where}: no such file; expected FILE.py:NAME, the path of a Python file")
    elif os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file of the user's must not hide a package
    try:
        return import_file(Path(resolved(place))) if is_path(place) else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_path(place) and error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(f"{where}: no module {shown(place)} here or installed; give FILE.py:NAME") from error
        raise UserError(f"{where}: cannot be imported: {located(error)}; install it, or mend the file") from error
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise UserError(f"{where}: cannot be imported: {located(error)}; mend the file") from error


def _digest(value: Any, module: ModuleType) -> str:
    inner = inspect.unwrap(getattr(value, "func", value))
    try:
        file = inspect.getsourcefile(inner) or str(module.__file__)
    except TypeError:  # of a builtin, or of an object that can be called
        file = str(module.__file__)
    return hashlib.sha256(Path(file).read_bytes() if os.path.isfile(file) else file.encode()).hexdigest()
