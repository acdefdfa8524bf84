"""Reward functions that the user names: `reward=FILE.py:FUNCTION` or `reward=MODULE:FUNCTION`."""

import functools
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlinvariant.arguments import suggestion
from rlinvariant.config.recipe import import_file, is_path, resolved
from rlinvariant.errors import UserError, one_line
from rlinvariant.text import shown


@dataclass(frozen=True)
class NamedReward:
    """Holds a reward function, and the SHA-256 of the file that defines it, as hex."""

    function: Callable[..., Any]
    digest: str


@functools.cache
def named_reward(name: str) -> NamedReward:
    """Import a reward function by its name. Modules of the working directory are found too.

    Raises:
        UserError: the name has another form, there is no such file, module or function, or importing it fails.
    """
    place, _, attribute = name.rpartition(":")
    where = f"reward={shown(name)}"
    if not place or not attribute.isidentifier():
        raise UserError(f"{where}: expected FILE.py:FUNCTION or MODULE:FUNCTION, such as my_rewards.py:right")
    module = _imported(place, where)
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{where}: {shown(place)} has no `{attribute}`{suggestion(attribute, functions)}")
    function = getattr(module, attribute)
    if not callable(function) or isinstance(function, type):
        raise UserError(f"{where}: expected a function, found {type(function).__name__} {shown(function, 60)}")
    return NamedReward(function, _digest(function, module))


def named_reward_problems(names: Sequence[str]) -> list[str]:
    """Import the reward functions of these names, and list what is wrong with them, one line each."""
    problems = [f"reward={shown(','.join(names))}: {name} is there twice; keep one" for name in twofold(names)]
    for name in dict.fromkeys(names):
        try:
            named_reward(name)
        except UserError as error:
            problems.append(str(error))
    return problems


def twofold(names: Sequence[str]) -> list[str]:
    """Return the names that are there more than once."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _imported(place: str, where: str) -> ModuleType:
    if is_path(place):
        if not place.endswith(".py") or not os.path.isfile(resolved(place)):
            raise UserError(f"{where}: no such file; expected FILE.py:FUNCTION, the path of a Python file")
    elif os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file of the user's must not hide a package
    try:
        return import_file(Path(resolved(place))) if is_path(place) else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_path(place) and error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(f"{where}: no module {shown(place)} here or installed; give FILE.py:FUNCTION") from error
        raise UserError(f"{where}: cannot be imported: {_said(error)}; install it, or mend the file") from error
    except (Exception, SystemExit) as error:  # the file is the user's own code
        raise UserError(f"{where}: cannot be imported: {_said(error)}; mend the file") from error


def _said(error: BaseException) -> str:
    """Say what an import raised, and where."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {one_line(error.msg)}"
    return f"{type(error).__name__}: {one_line(error)} ({at.filename}, line {at.lineno})"


def _digest(function: Any, module: ModuleType) -> str:
    inner = inspect.unwrap(getattr(function, "func", function))
    try:
        file = inspect.getsourcefile(inner) or str(module.__file__)
    except TypeError:  # of a builtin, or of an object that can be called
        file = str(module.__file__)
    return hashlib.sha256(Path(file).read_bytes() if os.path.isfile(file) else file.encode()).hexdigest()
