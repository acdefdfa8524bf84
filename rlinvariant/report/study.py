"""The subject of a report: the runs of an ablation, arm by arm and seed by seed, or one run alone."""

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlinvariant import reading
from rlinvariant.arguments import SCRIPT, given_by_user
from rlinvariant.errors import UserError
from rlinvariant.files import RUNS
from rlinvariant.report.panels import FLIPS, KEYS, PANELS, REWARD, Panel, of_evaluations, of_rewards, of_routers
from rlinvariant.report.rundir import SCHEMA, RunDir, gaps, quoted, read_rows
from rlinvariant.report.stats import (
    ACCURACY,
    HELD_OUT,
    LAST,
    MEASURES,
    NO_COMMON_SEED,
    Estimate,
    Measure,
    Row,
    Verdict,
    estimate,
    verdict,
)
from rlinvariant.text import shown
from rlinvariant.types import Json, JsonRow

EXACT = "exact"  # the arm that the others are compared with
COUNTS = tuple(f"onpolicy/{name}_tokens" for name in ("mismatched", "compared", "unscored"))


@dataclass
class Run:
    """Holds one run directory, as far as it came."""

    path: Path
    seed: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    result: Mapping[str, Any]  # empty: still running, or killed
    rows: Sequence[Row]
    evaluations: Sequence[Row] = ()

    def rows_of(self, panel: Panel) -> list[Row]:
        """Return the rows that a panel draws, one for each step."""
        if panel.of == "steps":
            return list(self.rows)
        return list({row["step"]: row for row in self.evaluations if row.get(panel.keys[0]) is not None}.values())

    @property
    def finished(self) -> bool:
        return self.result.get("finished") is True

    @property
    def trained(self) -> bool:
        """Say whether all its steps are there, and what is held out was graded after them, however the run ended then."""
        steps = self.setting("steps")
        graded = self.result.get("heldout_reward_after") is not None
        return self.finished or bool(graded and self.rows and steps == self.rows[-1]["step"])

    @property
    def why(self) -> str:
        """Say how it stopped before its end, if result.json knows."""
        outcome, error = self.result.get("outcome"), self.result.get("error")
        return "" if self.finished or not outcome else f" ({outcome}: {error})"

    def setting(self, key: str) -> Json:
        return self.config.get(key, {}).get("value")


@dataclass
class Arm:
    name: str
    description: str
    overrides: Sequence[str]
    runs: list[Run]

    @property
    def rows(self) -> list[Row]:
        """Return the rows of all seeds."""
        return [row for run in self.runs for row in run.rows]

    def estimate(self, measure: Measure) -> Estimate:
        """Return `stats.estimate` over the seeds whose value is known."""
        values = [measure.of(run.rows, run.result) for run in self.runs]
        return estimate([value for value in values if math.isfinite(value)])

    def against(self, reference: "Arm", measure: Measure) -> Verdict:
        """Compare this arm with `reference`, as this minus that: runs of one seed, over the steps that both have."""
        pairs = [(run, other) for run in self.runs for other in reference.runs if run.seed == other.seed]
        if self.runs and reference.runs and not pairs:
            return Verdict(estimate([]), NO_COMMON_SEED)
        values = [
            tuple(measure.of(one.rows[: min(len(run.rows), len(other.rows))], one.result) for one in (run, other))
            for run, other in pairs
        ]
        return verdict([pair[0] for pair in values], [pair[1] for pair in values])


@dataclass
class Study:
    """Holds arms on the same seeds; a single run is one arm with one seed."""

    path: Path
    recipe: str
    steps: int
    command: str
    arms: list[Arm]
    kind: Literal["run", "ablation", "comparison"]
    notes: list[str] = field(default_factory=list)  # what is missing or odd, for the reader

    @property
    def is_single(self) -> bool:
        return self.kind == "run"

    @property
    def runs(self) -> Iterator[tuple[Arm, Run]]:
        return ((arm, run) for arm in self.arms for run in arm.runs)

    @cached_property
    def panels(self) -> list[Panel]:
        """Return what is drawn of these runs: PANELS, and behind those of the reward what only some runs have."""
        found = of_rewards(row for _, run in self.runs for row in run.rows)
        found += of_evaluations(row for _, run in self.runs for row in run.evaluations)
        found += of_routers(row for _, run in self.runs for row in run.rows)
        at = 1 + max(i for i, panel in enumerate(PANELS) if panel.section == REWARD)
        return [*PANELS[:at], *found, *PANELS[at:]]

    @cached_property
    def reference(self) -> Arm | None:
        """Return the arm that the others are compared with, if there are any: the exact one, of a comparison the first."""
        if self.kind == "comparison":
            return self.arms[0] if len(self.arms) > 1 else None
        return next((arm for arm in self.arms if arm.name == EXACT), None) if len(self.arms) > 1 else None


def load(path: str | Path) -> Study:
    """Read a run directory or an ablation's, by its path or its name under runs/.

    Raises:
        UserError: it holds neither; a file in it is not what it should be; runs that cannot be compared are in one ablation.
    """
    path = Path(path)
    try:
        for place in (path, RUNS / path):
            if (place / "ablation.json").is_file():
                return _ablation(place)
            if RunDir(place).config.is_file():
                return _single(place)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}); restore it") from error
    if not path.is_dir() and not (RUNS / path).is_dir():
        raise UserError(f"{path}: no such directory, here or in {RUNS.resolve()}; give that of a run or of an ablation")
    raise UserError(f"{path}: holds no ablation.json and no config.json; give the directory of a run or of an ablation")


def _single(path: Path) -> Study:
    run = load_run(path)
    if (schema := run.environment.get("schema", SCHEMA)) != SCHEMA:
        raise UserError(f"{path}: schema {quoted(schema)}, expected {SCHEMA}; report it with the version that wrote it")
    name = str(run.setting("run") or path.name)
    arm = Arm(name, f"invariance={run.setting('invariance')}", [], [run])
    recipe, steps = str(run.setting("recipe") or run.setting("data.path")), int(run.setting("steps") or 0)
    study = Study(path, recipe, steps, command(run.config), [arm], kind="run")
    study.notes += notes(study)
    return study


def _ablation(path: Path) -> Study:
    file = path / "ablation.json"
    spec = reading.read(file)
    if spec.get("schema") != SCHEMA:
        raise UserError(
            f"{file}: schema {quoted(spec.get('schema'))}, expected {SCHEMA}; report it with the version that wrote it"
        )
    try:
        recipe, steps, seeds = spec["recipe"], int(spec["steps"]), [int(seed) for seed in spec["seeds"]]
        arms = [Arm(str(arm["name"]), str(arm["description"]), list(map(str, arm["overrides"])), []) for arm in spec["arms"]]
        study = Study(path, recipe, steps, str(spec["command"]), arms, kind="ablation")
        if not arms:
            raise ValueError("no arm")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not the description of an ablation ({type(error).__name__}: {error})") from error
    missing = []
    for arm in arms:
        for seed in seeds:
            directory = path / arm.name / f"seed-{seed}"
            if RunDir(directory).config.is_file():
                arm.runs.append(load_run(directory, seed))
            else:
                missing.append(f"{arm.name}/seed-{seed}")
    _refuse_mixed(study)
    known = [path / arm.name / f"seed-{seed}" for arm in arms for seed in seeds]
    others = [
        d for d in sorted(path.glob("*/seed-*")) if d.name[5:].isdecimal() and d not in known and RunDir(d).config.is_file()
    ]
    if others:  # copied from another machine, say
        named = ", ".join(f"{d.parent.name}/{d.name}" for d in others)
        study.notes.append(
            f"Not in ablation.json, so in no number here: {named}. rlinvariant ablate with these arms and seeds takes them in."
        )
    if missing:
        study.notes.append(f"Not started yet, and in no number here: {', '.join(missing)}.")
    study.notes += notes(study)
    return study


def _refuse_mixed(study: Study) -> None:
    """Refuse runs of several recipes, or of several layouts of files, in one ablation."""
    odd = [
        f"{arm.name}/seed-{run.seed} has recipe={shown(run.setting('recipe'), 40)}"
        for arm, run in study.runs
        if run.setting("recipe") != study.recipe
    ]
    if odd:
        raise UserError(
            f"{study.path}: an ablation of recipe={shown(study.recipe, 40)}, but {', '.join(odd)}; move them elsewhere"
        )
    odd = [
        f"{arm.name}/seed-{run.seed} has schema {quoted(schema)}"
        for arm, run in study.runs
        if (schema := run.environment.get("schema", SCHEMA)) != SCHEMA
    ]
    if odd:
        raise UserError(f"{study.path}: expected runs of schema {SCHEMA}, but {', '.join(odd)}; move them elsewhere")


def load_run(path: Path, seed: int | None = None) -> Run:
    """Read a run as far as it came; `seed` in place of its own. Raises UserError where a file is not what it should be."""
    files = RunDir(path)
    config = files.read_config()
    for key in ("seed", "steps"):
        value = config.get(key, {}).get("value")
        if value is not None and type(value) is not int and not (str(value).isdecimal() and len(str(value)) < 19):
            raise UserError(f"{files.config}: {key} is {quoted(value)}, expected an integer; restore it")
    there = os.path.lexists(files.metrics)
    rows, evaluations = read_rows(path) if there else ([], [])
    _check_numbers(files.metrics, rows)
    environment = reading.read(files.environment) if os.path.lexists(files.environment) else {}
    cpu = environment.get("cpu")
    objects = {key: environment.get(key) for key in ("git", "packages", "cpu", "gpu", "threads", "kernels", "vllm_environment")}
    for key, value in (objects | {"cpu.isa": cpu.get("isa") if isinstance(cpu, dict) else None}).items():
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{files.environment}: {key} is {quoted(value)}, expected a JSON object; restore it")
    given = config.get("seed", {}).get("value")
    return Run(path, int(given or 0) if seed is None else seed, config, environment, files.read_result(), rows, evaluations)


def _check_numbers(file: Path, rows: Sequence[Row]) -> None:
    """Refuse a drawn value that is neither a number nor null, and a count of tokens that is not whole.

    Raises:
        UserError: a value is something else.
    """
    for row in rows:
        for key in dict.fromkeys((*KEYS, *COUNTS, *(key for key in row if key.startswith(FLIPS)))):
            value = row.get(key)
            if value is not None and not isinstance(value, int | float):
                expected = "a number or null"
            elif value is not None and (key in COUNTS or key.startswith(FLIPS)) and not float(value).is_integer():
                expected = "a whole number of tokens"
            else:
                continue
            raise UserError(f"{file}: step {row['step']}: {key} is {quoted(value)}, expected {expected}; restore it")


def notes(study: Study) -> list[str]:
    """List what a reader must know before believing a curve: runs cut short, one seed only, values that are no numbers."""
    found = []
    place = {id(run): f"{arm.name}/seed-{run.seed}" if not study.is_single else "this run" for arm, run in study.runs}
    for _, run in study.runs:
        found += [f"{place[id(run)]}: {lost}." for lost in _lost(run)]
        if not run.rows:
            found.append(f"{place[id(run)]} has no step: it ended before the first one{run.why}.")
        elif run.trained and not run.finished:
            found.append(f"{place[id(run)]} has all its steps, was graded after them, and failed then{run.why}.")
        elif not run.finished:
            of = f" of {run.setting('steps')}" if run.setting("steps") else ""
            found.append(
                f"{place[id(run)]} has not ended by itself{run.why or ' (interrupted, or still running)'}: "
                f"its rows end at step {run.rows[-1]['step']}{of}, and there is no held-out reward after training."
            )
    seeds = {run.seed for _, run in study.runs}
    if not study.is_single and len(seeds) == 1:
        found.append("One seed: no interval, so no verdict. Add seeds to get both.")
    if len(study.arms) > 1 and study.reference is None:
        found.append(f"No arm is named {EXACT}: nothing to compare the others with, so no verdicts.")
    short = [place[id(run)] for _, run in study.runs if 0 < len(run.rows) < LAST]
    if short:
        where = "" if study.is_single else " in every run" if len(short) == len([*study.runs]) else f" in {', '.join(short)}"
        found.append(f"Fewer than {LAST} steps{where}: the reward there is the mean over all of them.")
    ends = sorted({run.rows[-1]["step"] for _, run in study.runs if run.trained and run.rows})
    if len(ends) > 1:
        found.append(
            f"Runs end at different steps, {ends[0]} to {ends[-1]}: what is held out was trained for different lengths."
        )
    machines = [run.environment for _, run in study.runs if run.environment]
    for what, of in (
        ("sets of package versions", [known.get("packages") for known in machines]),
        ("git commits", [(known.get("git") or {}).get("commit") for known in machines]),
        ("CPU models", [(known.get("cpu") or {}).get("model") for known in machines]),
        ("GPUs", [(known.get("gpu") or {}).get("name") for known in machines]),
    ):
        if len(different := {json.dumps(value, sort_keys=True) for value in of}) > 1:
            found.append(f"The runs were made with {len(different)} different {what}; of these, the first run's is below.")
    for panel in PANELS:
        for run in (run for _, run in study.runs if panel.shown_for(run.config)):
            known = [row for row in run.rows if all(row.get(key) is not None for key in panel.keys)]
            bad = [row["step"] for row, ok in zip(known, np.isfinite(panel.values(known)), strict=True) if not ok]
            if bad:
                where = f"step {bad[0]}" if len(bad) == 1 else f"{len(bad)} steps, first {bad[0]}"
                found.append(f"{panel.title}: not a finite number in {place[id(run)]} at {where}; the curve has a gap there.")
    return found


def _lost(run: Run) -> list[str]:
    """Say what a run should have and has not."""
    said = []
    if unknown := [key for key in ("recipe", "seed", "steps") if run.setting(key) is None]:
        said.append(f"config.json has no {', no '.join(unknown)}")
    if not run.environment:
        said.append("environment.json is missing or empty, so machine and versions are not known")
    steps = run.setting("steps")
    if run.finished and run.rows and isinstance(steps, int) and run.rows[-1]["step"] < steps:
        said.append(f"result.json says that it has ended, and metrics.jsonl does at step {run.rows[-1]['step']} of {steps}")
    if missing := gaps(run.rows):
        said.append(f"metrics.jsonl has no row of step {missing}, and no number here counts them")
    return said


def command(config: JsonRow, shared: bool = False) -> str:
    """Return the command line that gives a run this config.json again, in which secrets are masked.

    Args:
        config: what `Config.resolved` returns.
        shared: whether others read it: of an absolute path it has the last part, as the rest says where somebody's files are.
    """
    if (config.get("recipe") or {}).get("source") == SCRIPT:
        return shlex.join(["python", argument(config["recipe"]["value"], shared)])
    entries = {key: entry for key, entry in config.items() if given_by_user(entry.get("source", "")) and key != "resume"}
    given = {key: entry["value"] for key, entry in entries.items() if (key, entry["value"]) != ("recipe", "")}
    return shlex.join(["rlinvariant", "train", *(f"{key}={argument(value, shared)}" for key, value in given.items())])


def argument(value: Json, shared: bool = False) -> str:
    """Write a setting's value of a config.json as the command line takes it, and, `shared`, without the way to a file."""
    if isinstance(value, list):
        return ",".join(argument(item, shared) for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "None"
    return Path(str(value)).name if shared and os.path.isabs(str(value)) else str(value)


def measured(study: Study) -> list[Measure]:
    """Return the measures that any run has a value of; of the two names for the held-out reward, the one that fits all runs."""
    results = [run.result for _, run in study.runs if run.result.get("heldout_reward_after") is not None]
    other = HELD_OUT if all(result.get("heldout_is_accuracy") for result in results) else ACCURACY
    return [m for m in MEASURES if m is not other and any(math.isfinite(m.of(run.rows, run.result)) for _, run in study.runs)]
