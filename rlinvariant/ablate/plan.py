"""The runs of an ablation: seeds, arms, settings; from the command line, and from what is there already."""

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlinvariant import reading
from rlinvariant.ablate.arms import DEFAULT_ARMS, IMPOSSIBLE_ARMS, Arm, arm_named
from rlinvariant.arguments import twice
from rlinvariant.conflicts import SIDES
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import RUNS
from rlinvariant.report.rundir import SCHEMA, RunDir, quoted
from rlinvariant.text import shown

REFUSED_SETTINGS = {  # what the user may not set for all arms -> what to do instead
    **dict.fromkeys(("invariance", "staleness"), "each arm sets its own; choose with arms="),
    "trainer.vllm_importance_sampling_correction": "each arm sets its own; choose with arms=",
    "trainer.vllm_importance_sampling_mode": "each arm sets its own; choose with arms=",
    "seed": "write seeds=, a number of seeds or a list",
    "trainer.seed": "write seeds=, a number of seeds or a list",
    "machine": "write launch=FILE, an accelerate configuration, for runs of several processes",
    "resume": "the same command goes on where it ended",
}


@dataclass(frozen=True)
class Plan:
    """Holds what is to be run.

    Args:
        name: the directory is runs/ablation-NAME.
        recipe: of all runs.
        seeds: of data order and sampling.
        arms: what is compared.
        settings: `key=value`, for all arms.
        launch: an accelerate configuration for runs of several processes; None: each run is one process.
        at_once: how many run at the same time, in turn on each GPU.
    """

    name: str
    recipe: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    settings: tuple[str, ...]
    launch: str | None = None
    at_once: int = 1

    @property
    def path(self) -> Path:
        """Return the ablation's directory."""
        return RUNS / f"ablation-{self.name}"

    @property
    def command(self) -> str:
        """Return the command line that makes this plan."""
        lists = {"seeds": ",".join(map(str, self.seeds)), "arms": ",".join(arm.name for arm in self.arms)}
        lists["seeds"] += "," if len(self.seeds) == 1 else ""
        given = [f"recipe={self.recipe}", *(f"{k}={v}" for k, v in lists.items()), f"run={self.name}", *self.settings]
        given += [f"launch={self.launch}"] if self.launch else []
        return shlex.join(["rlinvariant", "ablate", *given, *([f"at_once={self.at_once}"] if self.at_once > 1 else [])])

    def run_dir(self, arm: Arm, seed: int) -> RunDir:
        """Return the directory of one run."""
        return RunDir(self.path / arm.name / f"seed-{seed}")

    def arguments(self, arm: Arm, seed: int, resume: bool = False) -> list[str]:
        """Return the arguments of `rlinvariant train` for one run."""
        own = [f"seed={seed}", f"run={self.run_dir(arm, seed).path.relative_to(RUNS)}", *(["resume=true"] if resume else [])]
        group = [] if any(s.startswith("wandb.group=") for s in self.settings) else [f"wandb.group=ablation-{self.name}"]
        sampler, trainer = next(sides for name, sides in SIDES.items() if f"invariance={name}" in arm.overrides)
        # What stock sides have not, and refuse
        absent = [*([] if trainer else ["trainer.tokens_per_microbatch="]), *([] if sampler or trainer else ["attention="])]
        settings = [s for s in self.settings if not s.startswith(tuple(absent))]
        return [f"recipe={self.recipe}", *settings, *group, *arm.overrides, *own]

    def jobs(self) -> list[tuple[Arm, int]]:
        """Return all runs, seed after seed, so that an ablation that is cut short has every arm."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def left(self) -> list[tuple[Arm, int]]:
        """Return the runs that have not finished."""
        return [job for job in self.jobs() if not self.run_dir(*job).is_finished]


def read(argv: Sequence[str]) -> Plan:
    """Return the plan that the arguments name. Raises ConfigErrors with all that is wrong with them."""
    errors, given = [], {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            errors.append(f"{argument}: expected key=value, e.g. seeds=3")
        elif key in REFUSED_SETTINGS:
            errors.append(f"{argument}: not a setting of ablate; {REFUSED_SETTINGS[key]}")
        elif key in given:
            errors.append(twice(key, given[key], value))
        else:
            given[key] = value
    if os.environ.get("WORLD_SIZE", "1") != "1":
        errors.append("WORLD_SIZE is set: ablate starts the runs itself; run it without accelerate launch, add launch=CONFIG")
    recipe = given.pop("recipe", "")
    if not recipe:
        errors.append("recipe: missing; write recipe=NAME, e.g. recipe=arithmetic")
    name = given.pop("run", Path(recipe).stem).removeprefix("ablation-")
    if recipe and not re.fullmatch(r"\w[\w.-]*", name):
        errors.append(f"run={name}: expected a name of letters, digits, '.', '_' and '-'; it becomes runs/ablation-NAME")
    seeds = _seeds(given.pop("seeds", "3"), errors)
    arms = tuple(
        _arm(word, errors) for word in given.pop("arms", ",".join(arm.name for arm in DEFAULT_ARMS)).split(",") if word
    )
    if not arms:
        errors.append("arms=: expected at least one; rlinvariant ablate --help lists them")
    if doubles := {arm.name for arm in arms if arm and arms.count(arm) > 1}:
        errors.append(f"arms: {', '.join(sorted(doubles))} given twice")
    launch = given.pop("launch", None)
    if launch is not None and not Path(launch).is_file():
        errors.append(f"launch={launch}: no such file; give an accelerate configuration, e.g. configs/cpu2.yaml")
    at_once = given.pop("at_once", "1")
    if not (at_once.isdecimal() and int(at_once) > 0):
        errors.append(f"at_once={at_once}: expected how many runs at the same time, 1 or more")
    elif int(at_once) > 1 and launch is not None:
        errors.append(f"at_once={at_once}: expected 1 with launch=, whose runs have all GPUs; leave out one of them")
    if errors:
        raise ConfigErrors(errors)
    settings = tuple(f"{key}={value}" for key, value in given.items())
    return Plan(name, recipe, seeds, tuple(arm for arm in arms if arm), settings, launch, int(at_once))


def _seeds(text: str, errors: list[str]) -> tuple[int, ...]:
    """Return the seeds that `text` names, a number of seeds or a list; if it is neither, (), and a line in `errors`."""
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() for word in words):
        errors.append(f"seeds={text}: expected a number of seeds, or a list a,b,c")
        return ()
    numbers = tuple(map(int, words))
    if "," not in text:
        numbers = tuple(range(numbers[0]))
    if not numbers:
        errors.append(f"seeds={text}: expected at least 1 seed")
    if len(set(numbers)) < len(numbers):
        errors.append(f"seeds={text}: a seed is given twice")
    return numbers


def _arm(name: str, errors: list[str]) -> Arm | None:
    """Return the arm of that name; if there is none, None, and a line in `errors`."""
    if found := arm_named(name):
        return found
    if name in IMPOSSIBLE_ARMS:
        errors.append(f"arms={name}: {IMPOSSIBLE_ARMS[name]}; leave it out")
        return None
    names = [arm.name for arm in DEFAULT_ARMS]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    errors.append(
        f"arms={name}: unknown arm; {hint} {', '.join(names)}, stale-K with another K, exact-top-p-P and drift-top-p-P"
    )
    return None


def extended(plan: Plan) -> Plan:
    """Return the plan with the seeds and arms that earlier commands have put into the same directory."""
    file = plan.path / "ablation.json"
    if not file.exists():
        return plan
    try:
        spec = reading.read(file, "choose another run=NAME")
        if spec["schema"] != SCHEMA:
            raise UserError(
                f"run={plan.name}: {file} has schema {quoted(spec['schema'])}, expected {SCHEMA}; choose another run=NAME"
            )
        earlier = [Arm(arm["name"], arm["description"], tuple(arm["overrides"])) for arm in spec["arms"]]
        for arm in earlier:  # their settings go to a command line
            if (known := arm_named(arm.name)) is None or known.overrides != arm.overrides:
                raise ValueError(f"arm {shown(arm.name, 40)} has other settings than the one of that name here")
        seeds = sorted({*plan.seeds, *map(int, spec["seeds"])})
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"run={plan.name}: {file} is not an ablation's ({error}); choose another run=NAME") from error
    names = {arm.name for arm in earlier}
    return replace(plan, seeds=tuple(seeds), arms=(*earlier, *(arm for arm in plan.arms if arm.name not in names)))
