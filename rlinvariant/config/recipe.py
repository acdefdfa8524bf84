"""Recipes: a Python file says what is trained on what, and may derive from another."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.arguments import suggestion
from rlinvariant.config.fields import ALIASES
from rlinvariant.errors import UserError

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
        check: config -> what is wrong with it, a line each, before anything is loaded.
    """

    name: str
    defaults: Mapping[str, Any]
    data: type[Data]
    datasets: Callable[..., Any]
    reward_funcs: Callable[..., Any]
    prepare_model: "Callable[[Config], str] | None" = None
    check: "Callable[[Config], list[str]] | None" = None


def recipe_names() -> list[str]:
    """List the packaged recipes, without importing any."""
    names = (module.name for module in pkgutil.iter_modules([str(PACKAGED_RECIPES)]))
    return sorted(name for name in names if not name.startswith("_"))  # _tiny.py and the like: what recipes share


def listed_recipes() -> str:
    """Return the packaged recipes' names for a message."""
    return ", ".join(recipe_names())


def load_recipe(recipe: str) -> Recipe:
    """Import a recipe by name or by path, and what it derives from. Its own bugs keep their traceback.

    Raises:
        UserError: there is no such recipe, it lacks a function, or its `BASE` leads back to it.
    """
    return _load(str(Path(recipe).expanduser().resolve()) if _is_path(recipe) else recipe, recipe)


@functools.cache
def _load(place: str, shown: str) -> Recipe:
    modules = _lineage(place, f"recipe={shown}")

    def part(name: str, default: Any = None) -> Any:
        return next((getattr(module, name) for module in modules if hasattr(module, name)), default)

    missing = [function for function in ("datasets", "reward_funcs") if not callable(part(function))]
    if missing:
        raise UserError(f"recipe={shown}: does not define {' and '.join(missing)}; see recipes/arithmetic.py")
    return Recipe(
        name=Path(place).stem if _is_path(place) else place,
        defaults=_merged([getattr(module, "DEFAULTS", {}) for module in reversed(modules)]),
        data=part("Data", Data),
        datasets=part("datasets"),
        reward_funcs=part("reward_funcs"),
        prepare_model=part("prepare_model"),
        check=part("check"),
    )


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay later defaults over earlier ones; an alias and its key are one setting."""
    merged: dict[str, Any] = {}
    for layer in layers:
        own = {ALIASES.get(key, key) for key in layer}
        merged = {key: value for key, value in merged.items() if ALIASES.get(key, key) not in own} | dict(layer)
    return merged


def _lineage(place: str, shown: str) -> list[ModuleType]:
    """Import a recipe and those it derives from, the nearest first."""
    modules: dict[str, ModuleType] = {}
    while True:
        if place in modules:
            names = " -> ".join(Path(name).stem for name in [*modules, place])
            raise UserError(f"{shown}: its BASE leads back to it: {names}; let one of them have no BASE")
        module = modules[place] = _import(place, shown)
        base = getattr(module, "BASE", None)
        if base is None:
            return list(modules.values())
        shown = f"{shown}: BASE={base}"
        # a path is relative to the file that names it
        place = str((Path(str(module.__file__)).parent / Path(base).expanduser()).resolve()) if _is_path(base) else base


def _is_path(recipe: str) -> bool:
    return recipe.endswith(".py") or "/" in recipe


def _import(place: str, shown: str) -> ModuleType:
    if _is_path(place):
        if not Path(place).is_file():
            raise UserError(f"{shown}: no such file; give the path of a recipe .py, or one of {listed_recipes()}")
        return _import_file(Path(place))
    if place not in recipe_names():
        hint = suggestion(place, recipe_names())
        raise UserError(f"{shown}: unknown recipe{hint}; there are: {listed_recipes()}, or a path to a .py file")
    return importlib.import_module(f"rlinvariant.recipes.{place}")


@functools.cache
def _import_file(path: Path) -> ModuleType:
    # A name of its own: two files called my.py must not meet in sys.modules, where chz looks annotations up.
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
