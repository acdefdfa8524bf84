"""The subject of an evaluation: a run, or a model, with the settings that belong to it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlinvariant import checkpoints, resume
from rlinvariant.config import Config, check, draft, unreachable
from rlinvariant.config.recipe import listed_recipes
from rlinvariant.conflicts import adapter_conflicts
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import RUNS
from rlinvariant.model_source import ADAPTER, adapter_base, source_problems
from rlinvariant.report.rundir import RunDir
from rlinvariant.text import shown

KEYS = ("recipe", "reward", "dtype", "attention", "seed", "invariance", "reward_timeout", "reward_cage", "reward_errors") + (
    "tools",
    "environment",
    "tool_format",
    "tool_timeout",
    "tool_cage",
    "tool_errors",
)
KEYS_OF_TRAINER = ("max_completion_length", "max_tool_calling_iterations", "reward_weights", "chat_template_kwargs") + (
    "top_k",
    "top_p",
    "min_p",
)
# An evaluation has one process, and an engine in it; the bits are the same
OF_A_RUN_ALONE = ("sampler.tensor_parallel_size", "sampler.servers", "sampler.trainer_token_file")
OF_THE_RUN = "trainer.temperature"  # taken from the run; on the command line it is --temperature
TAKEN = f"{', '.join(KEYS)}, data.*, sampler.*, trainer.{', trainer.'.join(KEYS_OF_TRAINER)}"


@dataclass(frozen=True)
class Subject:
    """Says what is evaluated.

    Args:
        config: the settings, those of the run and over them those of the command line; `config.model` are the weights.
        run: the run's directory; None for a model that is of none.
    """

    config: Config
    run: Path | None


def find(given: str, settings: Sequence[str]) -> Subject:
    """Find a run or a model, and its settings.

    Args:
        given: a run's name or directory, one of its checkpoints, a model's directory or hub id.
        settings: `key=value` arguments.

    Raises:
        ConfigErrors: every mistake, a line each, before anything is loaded.
        UserError: neither a run nor a model, a run that has no weights, or whose config.json is damaged.
    """
    run, weights = _located(given)
    if run is None and (missing := source_problems("model", weights, adapters=True)):  # before its recipe is asked for
        raise ConfigErrors([f"{shown(given)}: no such run (rlinvariant ls names those here); {line}" for line in missing])
    written = _keys(settings)
    errors = [f"{key}: eval does not take it; expected {TAKEN}" for key in written if not _is_taken(key)]
    own = [] if run is None else resume.arguments(run, list(settings))
    own = [argument for argument in own if _is_kept(key := argument.partition("=")[0]) and key not in written]
    read = draft([*own, *settings, f"model={weights}"])
    if read.recipe is None and not any(key == "recipe" for key in [*written, *_keys(own)]):
        others = "a path to a .py file, or data.path=FILE, data.eval_path=FILE and reward=FILE.py:FUNCTION"
        errors.append(f"recipe: missing; write recipe=NAME with one of {listed_recipes()}, {others}")
    errors += read.errors
    if read.config.invariance not in ("exact", "off"):
        errors.append(
            f"invariance={read.config.invariance}: expected exact or off: eval has a sampler alone; write one of them"
        )
    errors = errors or check(read.config, os.environ, read.recipe, adapters=True) or unreachable(read.config, adapters=True)
    if not errors and adapter_base(weights) is not None:
        errors += adapter_conflicts(f"model={weights}", "a whole model", read.config.invariance)
    if errors:
        raise ConfigErrors(list(dict.fromkeys(errors)))
    return Subject(read.config, run)


def _located(given: str) -> tuple[Path | None, str]:
    """Return the run that is meant, or None, and the weights."""
    path = Path(given)
    if not path.is_dir() and (RUNS / path).is_dir():
        path = RUNS / path
    if not path.is_dir():
        return None, given  # perhaps a hub id; `check` says it if it cannot be
    run = next((at for at in (path, path.parent, path.parent.parent) if RunDir(at).metrics.is_file()), None)
    if run is None or path != run:
        return run, str(path)
    directory = RunDir(run)
    if any((directory.model / name).is_file() for name in ("config.json", ADAPTER)):
        return run, str(directory.model)
    checkpoint, damages = checkpoints.newest(directory.checkpoints)
    if checkpoint is None:
        none = f"{shown(run)}: neither model nor a whole checkpoint; let the run save one"
        raise UserError("\n".join([none, *damages]))
    return run, str(checkpoint.path)


def _keys(settings: Sequence[str]) -> list[str]:
    return [setting.partition("=")[0] for setting in settings]


def _is_taken(key: str) -> bool:
    section, _, name = key.rpartition(".")
    if key in OF_A_RUN_ALONE:
        return False
    return key in KEYS or section in ("data", "sampler") or (section == "trainer" and name in KEYS_OF_TRAINER)


def _is_kept(key: str) -> bool:
    """Say whether a run's own setting holds for its evaluation, too."""
    return _is_taken(key) or key == OF_THE_RUN
