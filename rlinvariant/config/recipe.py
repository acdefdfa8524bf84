"""Recipes: a Python file says what is trained on what, and may derive from another."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.arguments import suggestion
from rlinvariant.config.fields import ALIASES
from rlinvariant.errors import UserError, one_line
from rlinvariant.text import shown
from rlinvariant.types import EnvironmentFactory, ToolCall

if TYPE_CHECKING:
    from rlinvariant.config.tree import Config

PACKAGED_RECIPES = Path(__file__).parents[1] / "recipes"


@chz.chz
class Data:
    """Holds what a recipe lets the user set about its data: a recipe subclasses this, under the name `Data`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the module-level names of a recipe file, and of the files that it derives from.

    Args:
        name: the file's name without its ending.
        defaults: `DEFAULTS`, key -> value; a file's own are laid over those of its `BASE`.
        data: `Data`, the chz class of its `data.*` keys.
        datasets: (config, tokenizer) -> (training rows, held-out rows or None).
        reward_funcs: config -> reward functions, as TRL calls them.
        prepare_model: config -> directory of a model that the recipe makes itself; None: the user names one.
        untrained: config -> the model and tokenizer that `prepare_model` begins with; a run is looked at with them first.
        check: config -> what is wrong with it, a line each, before anything is loaded.
        tools: config -> functions that the model may call, as `trl.GRPOTrainer` takes them; None: there are none.
        environment: config -> what makes an environment, as `trl.GRPOTrainer` takes it; None: there is none.
    """

    name: str
    defaults: Mapping[str, Any]
    data: type[Data]
    datasets: Callable[..., Any]
    reward_funcs: Callable[..., Any]
    prepare_model: "Callable[[Config], str] | None" = None
    untrained: "Callable[[Config], tuple[Any, Any]] | None" = None
    check: "Callable[[Config], list[str]] | None" = None
    tools: "Callable[[Config], list[ToolCall]] | None" = None
    environment: "Callable[[Config], EnvironmentFactory | None] | None" = None


OWN_DATA = "_own"  # the file in recipes/ of what is trained without a recipe: data.path= and reward=


def recipe_names() -> list[str]:
    """List the packaged recipes, without importing any."""
    names = (module.name for module in pkgutil.iter_modules([str(PACKAGED_RECIPES)]))
    return sorted(name for name in names if not name.startswith("_"))  # _tiny.py and the like: what recipes share


def listed_recipes() -> str:
    """Return the packaged recipes' names for a message."""
    return ", ".join(recipe_names())


def load_recipe(recipe: str) -> Recipe:
    """Import a recipe by name or by path, and what it derives from. Its own bugs keep their traceback.

    Args:
        recipe: the name or path; "": the user's own rows and rewards, without a recipe.

    Raises:
        UserError: there is no such recipe, it is no Python, one of its module-level names is not what it has to be, or its
            `BASE` leads back to it.
    """
    if not recipe:
        return dataclasses.replace(_load(OWN_DATA, ""), name="own")
    return _load(resolved(recipe) if is_path(recipe) else recipe, shown(recipe))


@functools.cache
def _load(place: str, name: str) -> Recipe:
    modules = _lineage(place, f"recipe={name}")

    def part(name: str, default: Any = None) -> Any:
        return next((getattr(module, name) for module in modules if hasattr(module, name)), default)

    where, optional = f"recipe={name}", ("prepare_model", "untrained", "check", "tools", "environment")
    if missing := [function for function in ("datasets", "reward_funcs") if not callable(part(function))]:
        raise UserError(f"{where}: does not define {' and '.join(missing)}; see recipes/arithmetic.py")
    if wrong := [function for function in optional if not (part(function) is None or callable(part(function)))]:
        raise UserError(f"{where}: {wrong[0]}={shown(part(wrong[0]))}: expected a function; see recipes/arithmetic.py")
    for module in modules:
        _require_settings(getattr(module, "DEFAULTS", {}), where)
    _require_data(part("Data", Data), where)
    return Recipe(
        name=Path(place).stem if is_path(place) else place,
        defaults=_merged([getattr(module, "DEFAULTS", {}) for module in reversed(modules)]),
        data=part("Data", Data),
        datasets=part("datasets"),
        reward_funcs=part("reward_funcs"),
        prepare_model=part("prepare_model"),
        untrained=part("untrained"),
        check=part("check"),
        tools=part("tools"),
        environment=part("environment"),
    )


def _require_settings(defaults: Any, where: str) -> None:
    if not isinstance(defaults, Mapping):
        raise UserError(f"{where}: DEFAULTS={shown(defaults)}: expected a dict of key -> value")
    if odd := [key for key in defaults if not isinstance(key, str)]:
        raise UserError(f"{where}: DEFAULTS has the key {shown(odd[0])}: expected a text such as 'steps'")


def _require_data(data: Any, where: str) -> None:
    """Refuse a `Data` that is no chz class of ours, or that cannot be made without arguments."""
    expected = "expected a class with @chz.chz that derives from rlinvariant.config.Data"
    if not (isinstance(data, type) and issubclass(data, Data) and chz.is_chz(data)):
        raise UserError(f"{where}: Data={shown(data)}: {expected}; see recipes/arithmetic.py")
    try:
        data()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: Data: every field needs a default: {one_line(error)}") from error


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay later defaults over earlier ones; an alias and its key are one setting."""
    merged: dict[str, Any] = {}
    for layer in layers:
        own = {ALIASES.get(key, key) for key in layer}
        merged = {key: value for key, value in merged.items() if ALIASES.get(key, key) not in own} | dict(layer)
    return merged


def _lineage(place: str, where: str) -> list[ModuleType]:
    """Import a recipe and those it derives from, the nearest first."""
    modules: dict[str, ModuleType] = {}
    while True:
        if place in modules:
            names = " -> ".join(Path(name).stem for name in [*modules, place])
            raise UserError(f"{where}: its BASE leads back to it: {names}; let one of them have no BASE")
        module = modules[place] = _import(place, where)
        base = getattr(module, "BASE", None)
        if base is None:
            return list(modules.values())
        where = f"{where}: BASE={shown(base)}"
        if not isinstance(base, str):
            raise UserError(f"{where}: expected the name of a recipe, or a path to one")
        # a path is relative to the file that names it
        place = resolved(base, os.path.dirname(str(module.__file__))) if is_path(base) else base


def is_path(recipe: str) -> bool:
    return recipe.endswith(".py") or "/" in recipe


def resolved(recipe: str, directory: str = "") -> str:
    """Return an absolute path without links. A text that can be no path stays as it is, and is then found to be no file."""
    try:
        return os.path.realpath(os.path.join(directory, os.path.expanduser(recipe)))
    except ValueError:  # a NUL in it
        return recipe


def _import(place: str, where: str) -> ModuleType:
    if is_path(place):
        if not os.path.isfile(place):
            raise UserError(f"{where}: no such file; give the path of a recipe .py, or one of {listed_recipes()}")
        if not place.endswith(".py"):
            raise UserError(f"{where}: expected a Python file, NAME.py, or one of {listed_recipes()}")
        try:
            Path(place).read_bytes()
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}") from error
        try:
            return import_file(Path(place))
        except SyntaxError as error:
            raise UserError(f"{where}: {error.filename}, line {error.lineno}: {one_line(error.msg)}; mend the file") from error
        except SystemExit as error:
            raise UserError(f"{where}: calls sys.exit({error.code!r}) while it is imported; take that out") from error
    if place not in (*recipe_names(), OWN_DATA):
        hint = suggestion(place, recipe_names())
        raise UserError(f"{where}: unknown recipe{hint}; there are: {listed_recipes()}, or a path to a .py file")
    return importlib.import_module(f"rlinvariant.recipes.{place}")


@functools.cache
def import_file(path: Path) -> ModuleType:
    # A name of its own: two files called my.py must not meet in sys.modules, where chz looks annotations up.
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a name in .py has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
