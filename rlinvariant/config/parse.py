"""Turn `key=value` arguments into a `Config`, and report every mistake at once."""

import dataclasses
import math
import os
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chz
from chz.blueprint import Castable, InvalidBlueprintArg
from chz.tiepin import type_repr

from rlinvariant.arguments import suggestion, twice
from rlinvariant.config.check import check, check_run
from rlinvariant.config.fields import ALIASES, OWNED, trainer_config_class
from rlinvariant.config.file import read_file
from rlinvariant.config.recipe import Data, Recipe, listed_recipes, load_recipe
from rlinvariant.config.tree import Config, Leaf, LoraConfig, PPOConfig, SamplerConfig, WandbConfig, leaves, plain
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.text import shown
from rlinvariant.types import Untyped

COMMAND_LINE = "command line"
"""Source of a value that stands on the command line."""
WITHOUT_RECIPE = ("data.path", "reward")  # what says, without a recipe, what is trained on what
MEANT = {"name": "run", "run_name": "run"}
"""Name that other programs have for a key, and that looks like none of ours -> the key."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Holds values of one source, which is laid over those before it.

    Args:
        source: what config.json says of each value.
        values: key, as written, -> value.
        origins: key -> how its line begins, where that is not the key itself.
    """

    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Draft:
    """Holds arguments as they were understood: the configuration without what is wrong, and a line for each thing that is.

    `is_whole` is False where the file of `config=` could not be read, so that what it would set is not known.
    """

    config: Config
    recipe: Recipe | None
    errors: list[str]
    is_whole: bool


def parse(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Config:
    """Build the configuration of a run from `key=value` arguments.

    Args:
        argv: arguments without the program's name.
        env: environment variables, read for conflicts and for the launcher's ranks.

    Raises:
        ConfigErrors: with one line per problem, all of them.
    """
    read = draft(argv)
    config, errors = read.config, list(read.errors)
    if not config.run:
        config = chz.replace(config, run=_run_name(read.recipe.name if read.recipe else "run", env))
    errors += check(config, env, read.recipe) + check_run(config, env)
    if read.recipe is None and "recipe" not in config.sources and read.is_whole:
        others = "or a path to a .py file; or, without a recipe, data.path=FILE and reward=FILE.py:FUNCTION"
        errors.append(f"recipe: missing; write recipe=NAME with one of {listed_recipes()}, {others}")
    if errors:
        raise ConfigErrors(errors)
    return config


def draft(argv: Sequence[str]) -> Draft:
    """Read arguments as far as they go: keys that exist, with values of their types. Neither recipe nor run need be named."""
    layers, errors = _layers(argv)
    is_whole = not errors or all(layer.values or layer.source == COMMAND_LINE for layer in layers)
    recipe, written = None, {key: value for layer in layers for key, value in layer.values.items()}
    try:
        if isinstance(named := written.get("recipe"), Castable):
            recipe = load_recipe(named.value)
        elif any(key in written for key in WITHOUT_RECIPE):
            recipe = load_recipe("")
    except UserError as error:
        errors.append(str(error))
    if recipe:
        source = f"recipe {recipe.name}"
        layers.insert(0, Layer(source, recipe.defaults, dict.fromkeys(recipe.defaults, f"{source}: ")))
    blueprint = chz.Blueprint(Config).apply(
        {
            "recipe": "",
            "data": recipe.data if recipe else Data,
            "trainer": trainer_config_class(),
            "ppo": PPOConfig,
            "lora": LoraConfig,
            "sampler": SamplerConfig,
            "wandb": WandbConfig,
        }
    )
    sources: dict[str, str] = {}
    for layer in layers:
        errors += [clash if layer.source == COMMAND_LINE else f"{layer.source}: {clash}" for clash in _clashes(layer.values)]
        known = leaves(blueprint.make())
        for name, value in layer.values.items():
            key = ALIASES.get(name, name)
            if recipe is None and key.startswith("data."):
                continue  # which keys there are is the recipe's to say
            if problem := _problem(key, value, known, recipe.data if recipe else Data):
                errors.append(f"{layer.origins.get(name, '')}{shown(name)}={_shown(name, value)}: {problem}")
            else:
                blueprint.apply({key: value})
                sources[key] = layer.source
    config: Config = blueprint.apply({"sources": sources}).make()
    return Draft(config, recipe, errors, is_whole)


def _layers(argv: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """Return the values of the file that `config=` names, and those of the command line; list what is wrong with their form."""
    given, errors = _split(argv)
    layers = [Layer(COMMAND_LINE, given, {})]
    if (file := given.pop("config", None)) is not None:
        settings, problems = read_file(file.value)
        errors += problems
        origins = {key: f"{shown(file.value)}:{setting.line}: " for key, setting in settings.items()}
        layers.insert(0, Layer(f"file {file.value}", {key: setting.value for key, setting in settings.items()}, origins))
    return layers, errors


def _split(argv: Sequence[str]) -> tuple[dict[str, Castable], list[str]]:
    """Split arguments into keys and values; list those that are no `key=value`."""
    given, errors = {}, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            errors.append(f"{shown(argument)}: expected key=value, e.g. steps=100")
        elif key.startswith("-"):
            errors.append(f"{shown(argument)}: expected key=value without dashes; write {shown(argument.lstrip('-'))}")
        elif key in given:
            errors.append(twice(key, _shown(key, given[key]), _shown(key, text)))
        else:
            given[key] = Castable(text)
    return given, errors


def _clashes(layer: Mapping[str, Any]) -> list[str]:
    """List the settings that are given by both of their names."""
    return [
        f"{key}={_shown(key, layer[key])} and {alias}={_shown(alias, layer[alias])}: both set the same value; keep {key}"
        for alias, key in ALIASES.items()
        if alias in layer and key in layer
    ]


def _problem(key: str, value: Any, known: Mapping[str, Leaf], data: type[Data]) -> str | None:
    """Say what is wrong with the value of a key, or None; `data` is the class of the keys `data.*`."""
    owned = OWNED.get(key.removeprefix("trainer.")) if key.startswith("trainer.") else None
    if owned:
        return f"not a setting here; {owned}"
    if key not in known:
        by_name = [path for path in known if path.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        if key in MEANT:
            return f"unknown key; did you mean {MEANT[key]}?"
        return "unknown key" + suggestion(key, by_name or [*known, *ALIASES], 0.0 if by_name else 0.6)
    try:
        made = _made(key, value, known[key], data)
    except (InvalidBlueprintArg, TypeError, ValueError, RecursionError, MemoryError):  # the last: too many brackets
        return f"expected {expected(known[key].type)}; default {known[key].value!r}"
    if not _is_finite(made):
        return f"expected finite numbers, no nan and no infinity; default {known[key].value!r}"
    return None


def _made(key: str, value: Any, leaf: Leaf, data: type[Data]) -> Any:
    """Return the value that a setting gets: from a class of this field alone: the whole tree takes 30 times as long."""
    section, _, name = key.rpartition(".")
    if section == "data":  # its class may have checks of its own
        return getattr(chz.Blueprint(data).apply({name: value}).make(), name)
    field: Any = chz.chz(type("Field", (), {"__annotations__": {"value": leaf.type}, "__module__": __name__}))
    return chz.Blueprint(field).apply({"value": value}).make().value


def _is_finite(value: Any) -> bool:
    """Say whether no number in a value, or in what it holds, is NaN or infinite."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _run_name(recipe: str, env: Mapping[str, str]) -> str:
    """Name a run recipe-date-time. Under a launcher all ranks must agree, so the time is that of their parent's start."""
    started = time.time()
    if env.get("WORLD_SIZE", "1") != "1":
        import psutil

        started = psutil.Process(os.getppid()).create_time()
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"


def _shown(key: str, value: Any) -> str:
    """Write a value into a line; a token is not shown."""
    return shown(plain(key, value.value if isinstance(value, Castable) else value))


def expected(annotation: Untyped) -> str:
    """Return a type as a user reads it."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if any(typing.get_origin(part) is Literal for part in typing.get_args(annotation)):  # of a union
        return " or ".join(expected(part).removeprefix("one of ") for part in typing.get_args(annotation))
    return type_repr(annotation).replace("typing.", "")
