"""Several runs and ablations as one study, arm beside arm: what `rlinvariant report RUN RUN ...` shows."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlinvariant.errors import UserError
from rlinvariant.files import RUNS
from rlinvariant.report import study
from rlinvariant.report.study import Arm, Run, Study
from rlinvariant.text import plural, shown

# Settings that say which run it is, and how it is looked at: runs that differ in nothing else are seeds of one arm
OWN = re.compile(r"seed|run|resume|wandb\..*|trainer\.(output_dir|run_name|logging_dir|seed|data_seed)|warmstart\.run")
SETTINGS = 6  # that differ, named beside an arm


def located(paths: Sequence[str | Path]) -> list[Path]:
    """Return the directories that paths or names of runs mean, each once.

    Raises:
        UserError: one is given twice, or is not there.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        place = next((p for p in (path, RUNS / path) if p.is_dir()), None)
        if place is None:
            raise UserError(f"{path}: no such directory, here or in {RUNS.resolve()}; give that of a run or of an ablation")
        if place.resolve() in found:
            raise UserError(f"{path}: given twice, as {found[place.resolve()]}; name each run once")
        found[place.resolve()] = place
    return list(found.values())


def load(paths: Sequence[Path]) -> Study:
    """Read one run or ablation, or several into one study; UserError as `study.load`."""
    return study.load(paths[0]) if len(paths) == 1 else compare([study.load(path) for path in paths])


def compare(studies: Sequence[Study]) -> Study:
    """Make one study of several: the arms of ablations as they are, and of runs one arm for each setting."""
    arms: list[Arm] = []
    single = [one.arms[0].runs[0] for one in studies if one.is_single]
    groups: dict[str, list[Run]] = {}
    for run in single:
        groups.setdefault(settings(run), []).append(run)
    placed: set[str] = set()
    for one in studies:
        if not one.is_single:
            arms += [Arm(f"{_label(one.path)}/{arm.name}", arm.description, arm.overrides, arm.runs) for arm in one.arms]
        elif (key := settings(one.arms[0].runs[0])) not in placed:
            placed.add(key)
            arms += _arms(groups[key])
    differing = _differing([run for arm in arms for run in arm.runs[:1]])
    for arm in arms:
        if arm.runs and not arm.overrides:
            arm.overrides = [f"{key}={shown(study.argument(arm.runs[0].setting(key)), 40)}" for key in differing]
            more = f", and {len(differing) - SETTINGS} more" if len(differing) > SETTINGS else ""
            arm.description = ", ".join(arm.overrides[:SETTINGS]) + more
    _make_unique(arms)
    command = shlex.join(["rlinvariant", "report", *(str(one.path) for one in studies)])
    recipes = list(dict.fromkeys(one.recipe for one in studies))
    made = Study(
        path=RUNS / f"comparison-{_name(studies)}",
        recipe=", ".join(recipes),
        steps=max(one.steps for one in studies),
        command=command,
        arms=arms,
        kind="comparison",
    )
    if len(recipes) > 1:
        made.notes.append(f"Of {plural(len(recipes), 'recipe')}: {made.recipe}. Their rewards are not of one task.")
    made.notes += study.notes(made)
    return made


def settings(run: Run) -> str:
    """Return all settings but those of OWN, as text: equal for runs that are seeds of one arm."""
    return json.dumps({key: e["value"] for key, e in sorted(run.config.items()) if not OWN.fullmatch(key)}, sort_keys=True)


def _arms(runs: Sequence[Run]) -> Iterator[Arm]:
    """Yield an arm of runs with equal settings; a seed that is there twice begins another."""
    left = list(runs)
    while left:
        seeds: dict[int, Run] = {}
        for run in left:
            seeds.setdefault(run.seed, run)
        chosen = [seeds[seed] for seed in sorted(seeds)]
        left = [run for run in left if all(run is not other for other in chosen)]
        yield Arm(_stem([_label(run.path) for run in chosen]), "", [], chosen)


def _label(path: Path) -> str:
    """Return the name of a run's directory, of an ablation's with its arm: exact/seed-0."""
    place = path.resolve()
    return f"{place.parent.name}/{place.name}" if re.fullmatch(r"seed-\d+", place.name) else place.name


def _stem(names: Sequence[str]) -> str:
    """Return what names begin with, as `words` of words-0 and words-1; else the first, and how many more there are."""
    if len(names) == 1:
        return names[0]
    stem = os.path.commonprefix(list(names))
    if any(name[len(stem) :][:1].isdigit() for name in names):
        stem = stem.rstrip("0123456789")  # words-10 and words-11 are not words-1
    stem = re.sub(r"([-_./]+(seed|s)?[-_./]*|seed)$", "", stem)
    return stem or f"{names[0]} and {len(names) - 1} more"


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return the settings in which runs differ, those that a user gave first."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not OWN.fullmatch(key))
    differ = [key for key in keys if len({json.dumps(run.setting(key), sort_keys=True) for run in runs}) > 1]
    given = {k for run in runs for k in differ if study.given_by_user(run.config.get(k, {}).get("source", ""))}
    return sorted(differ, key=lambda key: key not in given)


def _make_unique(arms: Sequence[Arm]) -> None:
    seen: dict[str, int] = {}
    for arm in arms:
        seen[arm.name] = seen.get(arm.name, 0) + 1
        if seen[arm.name] > 1:
            arm.name = f"{arm.name} ({seen[arm.name]})"


def _name(studies: Sequence[Study]) -> str:
    """Return a file name of at most 80 characters made of the runs' names."""
    whole = "-".join(re.sub(r"[^\w.-]+", "_", _label(one.path)) for one in studies)
    return whole if len(whole) <= 80 else f"{whole[:60]}-{hashlib.sha256(whole.encode()).hexdigest()[:10]}"
