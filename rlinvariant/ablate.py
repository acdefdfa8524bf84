"""`rlinvariant ablate`: one recipe under several arms, on the same seeds, data and initial weights, into one report.

    runs/ablation-NAME/ablation.json          what was asked for
    runs/ablation-NAME/ARM/seed-N/            an ordinary run directory, and log.txt
    runs/ablation-NAME/report.html, summary.json

Each run is a process of its own, one after the other. The same command again goes on where it ended. A seed is that of data
order and sampling; data and initial weights are the recipe's.
"""

import difflib
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlinvariant.config import RUNS, Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import write_atomically
from rlinvariant.report import html, tables
from rlinvariant.report.console import Console, total
from rlinvariant.report.rundir import SCHEMA, RunDir
from rlinvariant.report.stats import Estimate, Measure
from rlinvariant.report.study import Study, measured

CORRECTIONS = {  # TRL's four, by the name of an arm: what becomes of an importance ratio beyond the cap
    "token-truncate": "each token weighted by its ratio, at most the cap",
    "token-mask": "tokens with a ratio above the cap left out",
    "sequence-truncate": "each completion weighted by its ratio, at most the cap",
    "sequence-mask": "completions with a ratio above the cap left out",
}


@dataclass(frozen=True)
class Arm:
    """One setting to compare: `overrides` are what it adds to the command line of `rlinvariant train`."""

    name: str
    description: str
    overrides: tuple[str, ...]


def setting(invariance: str, staleness: int = 0, mode: str = "") -> tuple[str, ...]:
    """All that arms differ in, so that no default of a recipe gets into one."""
    name = "trainer.vllm_importance_sampling"
    correction = (f"{name}_correction=true", f"{name}_mode={mode.replace('-', '_')}") if mode else (f"{name}_correction=false",)
    return (f"invariance={invariance}", f"staleness={staleness}", *correction)


def stale(steps: int, mode: str = "") -> Arm:
    description = f"both sides invariant, the sampler's weights {steps} optimizer steps old"
    if mode:
        description = f"{description}; {CORRECTIONS[mode]}"
    return Arm(f"stale-{steps}-{mode}".rstrip("-"), description, setting("exact", steps, mode))


ARMS = (
    Arm("exact", "both sides invariant: nothing to correct", setting("exact")),
    Arm("drift", "both sides stock, no correction", setting("off")),
    *(Arm(f"drift-{m}", f"both sides stock; {text}", setting("off", mode=m)) for m, text in CORRECTIONS.items()),
    Arm("sampler", "only the sampler invariant", setting("sampler")),
    Arm("trainer", "only the trainer invariant", setting("trainer")),
    stale(4),
    stale(4, "token-truncate"),
)
"""What runs by default."""
GRPO = Arm("grpo", "both sides invariant; GRPO in place of PPO", (*setting("exact"), "algorithm=grpo"))
"""For a recipe of PPO: the same with a group's mean in place of a critic."""
MISSING = {"fp16": "float16 on both sides: not possible, dtype has bfloat16 and float32 only"}
"""Arms that are asked for elsewhere, and why they cannot run here."""
OWNED = {  # what the user may not set for all arms, and why
    **dict.fromkeys(("invariance", "staleness"), "each arm sets its own; choose with arms="),
    "trainer.vllm_importance_sampling_correction": "each arm sets its own; choose with arms=",
    "trainer.vllm_importance_sampling_mode": "each arm sets its own; choose with arms=",
    "seed": "write seeds=, a number of seeds or a list",
    "trainer.seed": "write seeds=, a number of seeds or a list",
    "resume": "the same command goes on where it ended",
}
USAGE = """usage: rlinvariant ablate recipe=NAME [seeds=3] [arms=a,b] [steps=N] [run=NAME] [launch=FILE] [key=value ...]

  seeds   a number of seeds, or a list: seeds=3 is seeds=0,1,2. They are of data order and sampling; the data and the
          initial weights are the recipe's, and the same in all runs
  arms    a list of the names below, stale-K and stale-K-CORRECTION with any K, and, for a recipe of PPO, grpo
  run     the directory is runs/ablation-NAME; by default the recipe's name. The same command goes on where it ended
  launch  an accelerate configuration, e.g. configs/cpu2.yaml, for runs of several processes; without it each run is one process
  others  as for `rlinvariant train`, for all arms

arms (all by default):"""


@dataclass(frozen=True)
class Plan:
    """What is to be run. `settings` go to all arms."""

    name: str
    recipe: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    settings: tuple[str, ...]
    launch: str | None = None

    @property
    def path(self) -> Path:
        return RUNS / f"ablation-{self.name}"

    @property
    def command(self) -> str:
        """The command line that makes all of it."""
        lists = {"seeds": ",".join(map(str, self.seeds)), "arms": ",".join(arm.name for arm in self.arms)}
        lists["seeds"] += "," if len(self.seeds) == 1 else ""
        given = [f"recipe={self.recipe}", *(f"{k}={v}" for k, v in lists.items()), f"run={self.name}", *self.settings]
        return shlex.join(["rlinvariant", "ablate", *given, *([f"launch={self.launch}"] if self.launch else [])])

    def run_dir(self, arm: Arm, seed: int) -> RunDir:
        return RunDir(self.path / arm.name / f"seed-{seed}")

    def arguments(self, arm: Arm, seed: int, resume: bool = False) -> list[str]:
        """Of `rlinvariant train`."""
        own = [f"seed={seed}", f"run={self.run_dir(arm, seed).path.relative_to(RUNS)}", *(["resume=true"] if resume else [])]
        group = [] if any(s.startswith("wandb.group=") for s in self.settings) else [f"wandb.group=ablation-{self.name}"]
        return [f"recipe={self.recipe}", *self.settings, *group, *arm.overrides, *own]

    def jobs(self) -> list[tuple[Arm, int]]:
        """Seed after seed, so that an ablation that is cut short has every arm."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def left(self) -> list[tuple[Arm, int]]:
        return [job for job in self.jobs() if not self.run_dir(*job).result.exists()]


def ablate(argv: Sequence[str]) -> int:
    """Run what is left of the ablation, write its report, print its table. Returns the exit code.

    Raises:
        UserError: what cannot run, or does not belong to what is there; before anything starts.
    """
    if "--help" in argv or "-h" in argv:
        print("\n".join([USAGE, *(f"  {arm.name:<24} {arm.description}" for arm in ARMS)]))
        return 0
    console = Console(heartbeat_s=60.0)
    wanted = read(argv)
    plan = extended(wanted)
    configs = checked(plan)
    refuse_mixed(plan, configs)
    steps = configs[plan.arms[0].name].steps
    plan.path.mkdir(parents=True, exist_ok=True)
    with locked(plan.path) as lock:
        spec = {"schema": SCHEMA, "command": plan.command, "recipe": plan.recipe, "steps": steps, "seeds": list(plan.seeds)}
        arms = [{"name": arm.name, "description": arm.description, "overrides": list(arm.overrides)} for arm in plan.arms]
        _write(plan.path / "ablation.json", spec | {"settings": list(plan.settings), "arms": arms})
        left = plan.left()
        size = f"{len(plan.arms)} arms x {len(plan.seeds)} seeds x {steps} steps"
        console.print(f"{plan.path}: {size}, {len(plan.jobs()) - len(left)} of {len(plan.jobs())} runs done before")
        if more := [arm.name for arm in plan.arms if arm not in wanted.arms]:
            console.print(f"with the arms that it has already: {', '.join(more)}")
        if wanted.arms == ARMS:
            for name, reason in MISSING.items():
                console.print(f"without {name}: {reason}")
        try:
            failed = _run_all(plan, left, steps, console, lock)
        except KeyboardInterrupt:
            jobs = len(plan.jobs())
            console.print(f"stopped: {jobs - len(plan.left())} of {jobs} runs are done and kept; go on with")
            console.print(f"  {plan.command}")
            return 130
        if failed:
            console.print(f"failed: {', '.join(failed)}; the same command tries them again")
        if len(plan.left()) < len(plan.jobs()):
            report(plan.path, console)
    return 1 if failed else 0


# ---- what to run


def read(argv: Sequence[str]) -> Plan:
    """The plan that the arguments name. Raises ConfigErrors with all that is wrong with them."""
    errors, given = [], {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            errors.append(f"{argument}: expected key=value, e.g. seeds=3")
        elif key in OWNED:
            errors.append(f"{argument}: not a setting of ablate; {OWNED[key]}")
        else:
            given[key] = value
    if os.environ.get("WORLD_SIZE", "1") != "1":
        errors.append("WORLD_SIZE is set: ablate starts the runs itself; run it without accelerate launch, add launch=CONFIG")
    recipe = given.pop("recipe", "")
    if not recipe:
        errors.append("recipe: missing; write recipe=NAME, e.g. recipe=arithmetic")
    name = given.pop("run", Path(recipe).stem).removeprefix("ablation-")
    if name and not re.fullmatch(r"\w[\w.-]*", name):
        errors.append(f"run={name}: expected a name of letters, digits, '.', '_' and '-'; it becomes runs/ablation-NAME")
    seeds = _seeds(given.pop("seeds", "3"), errors)
    arms = tuple(_arm(word, errors) for word in given.pop("arms", ",".join(arm.name for arm in ARMS)).split(",") if word)
    if not arms:
        errors.append("arms=: expected at least one; rlinvariant ablate --help lists them")
    if twice := {arm.name for arm in arms if arm and arms.count(arm) > 1}:
        errors.append(f"arms: {', '.join(sorted(twice))} given twice")
    launch = given.pop("launch", None)
    if launch is not None and not Path(launch).is_file():
        errors.append(f"launch={launch}: no such file; give an accelerate configuration, e.g. configs/cpu2.yaml")
    if errors:
        raise ConfigErrors(errors)
    settings = tuple(f"{key}={value}" for key, value in given.items())
    return Plan(name, recipe, seeds, tuple(arm for arm in arms if arm), settings, launch)


def _seeds(text: str, errors: list[str]) -> tuple[int, ...]:
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
    if found := next((arm for arm in (*ARMS, GRPO) if arm.name == name), None):
        return found
    if match := re.fullmatch(rf"stale-([1-9]\d*)(?:-({'|'.join(CORRECTIONS)}))?", name):
        return stale(int(match[1]), match[2] or "")
    if name in MISSING:
        errors.append(f"arms={name}: {MISSING[name]}; leave it out")
        return None
    names = [arm.name for arm in ARMS]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    errors.append(f"arms={name}: unknown arm; {hint} {', '.join(names)}, and stale-K with another K")
    return None


def extended(plan: Plan) -> Plan:
    """With the seeds and arms that an earlier command has put into the same directory."""
    file = plan.path / "ablation.json"
    if not file.exists():
        return plan
    try:
        spec = json.loads(file.read_text())
        if spec["schema"] != SCHEMA:
            raise UserError(f"run={plan.name}: {file} has schema {spec['schema']}, expected {SCHEMA}; choose another run=NAME")
        earlier = [Arm(arm["name"], arm["description"], tuple(arm["overrides"])) for arm in spec["arms"]]
        seeds = sorted({*plan.seeds, *map(int, spec["seeds"])})
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"run={plan.name}: {file} is not an ablation's ({error}); choose another run=NAME") from error
    names = {arm.name for arm in earlier}
    return replace(plan, seeds=tuple(seeds), arms=(*earlier, *(arm for arm in plan.arms if arm.name not in names)))


def checked(plan: Plan) -> dict[str, Config]:
    """The configuration of each arm, by name: what a run would refuse is refused now, each line once."""
    environment: dict[str, str] = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    if plan.launch is not None:
        processes = re.search(r"^num_processes: *(\d+)", Path(plan.launch).read_text(), re.M)
        if processes is None:
            raise UserError(f"launch={plan.launch}: has no num_processes; give an accelerate configuration")
        environment |= {"WORLD_SIZE": processes[1], "LOCAL_WORLD_SIZE": processes[1]}
    configs, found = {}, dict[str, list[str]]()
    for arm in plan.arms:
        arguments = [a for a in plan.arguments(arm, plan.seeds[0]) if not a.startswith("run=")]
        try:
            config = configs[arm.name] = parse([*arguments, f"run=ablation-{plan.name}/{arm.name}/check"], environment)
            lines = []
            if config.staleness >= config.steps:
                lines = [f"steps={config.steps}: expected more than the lag of arm {arm.name}; raise steps, or choose arms="]
            if arm == GRPO and config.load_recipe().defaults.get("algorithm") != "ppo":
                lines = [f"arms={arm.name}: recipe={plan.recipe} is one of GRPO, where this is arm exact; leave it out"]
        except ConfigErrors as error:
            lines = error.errors
        for line in lines:
            found.setdefault(line, []).append(arm.name)
    if found:
        everywhere = len(plan.arms)
        raise ConfigErrors([a if len(b) == everywhere else f"{a} (arm {', '.join(b)})" for a, b in found.items()])
    return configs


def refuse_mixed(plan: Plan, configs: Mapping[str, Config]) -> None:
    """Every run that is there must have been made with the settings of now."""
    for arm, seed in plan.jobs():
        run = plan.run_dir(arm, seed)
        if not run.config.exists():
            continue
        then, now = json.loads(run.config.read_text()), configs[arm.name].resolved()
        for key in now.keys() & then.keys() - {"run", "resume", "seed"}:
            if not key.startswith("wandb.") and then[key]["value"] != now[key]["value"]:
                raise UserError(
                    f"run={plan.name}: {run.path} was run with {key}={then[key]['value']}, and now it is {now[key]['value']}; "
                    "an ablation has one setting for all: add run=NAME for a new one"
                )


# ---- running it


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """One ablate at a time in a directory. A run inherits the lock, so that one that outlives its ablate holds it too."""
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another ablate, or a run that it started, is at work here; wait, or stop it") from None
        yield file.fileno()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end the run that is going on as ctrl-C does.

    SIGINT is named too: where it was ignored (a script's background), a run would inherit that and could not be stopped by it.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_all(plan: Plan, left: Sequence[tuple[Arm, int]], steps: int, console: Console, lock: int) -> list[str]:
    """Run after run; returns the names of those that failed. The first of all that fails ends it: so would the others."""
    failed: list[str] = []
    began = time.monotonic()
    with _terminated_as_interrupted():
        for number, (arm, seed) in enumerate(left, start=1):
            run, name = plan.run_dir(arm, seed), f"{arm.name}/seed-{seed}"
            resume, note = prepare(run, steps)
            if note:
                console.print(f"{name}: {note}")
            try:
                with console.stage(f"[{number}/{len(left)}] {arm.name}, seed {seed}", steps) as advance:
                    _run(_command(plan, plan.arguments(arm, seed, resume)), run, advance, lock)
            except RunFailed as error:
                console.print(f"  {name} failed; {run.path / 'log.txt'} ends with")
                for line in error.lines:
                    console.print(f"    {line}")
                failed.append(name)
                if number == 1 and len(left) > 1:
                    console.print("the first run failed, as the others would: they are not started")
                    return failed
                continue
            seconds = (time.monotonic() - began) / number * (len(left) - number)
            console.print(f"  {_outcome(run)}" + (f"; about {max(1, round(seconds / 60))} min left" if seconds else ""))
    return failed


def prepare(run: RunDir, steps: int) -> tuple[bool, str]:
    """(whether to resume, what to say): a run that was interrupted goes on from its checkpoint, or is set aside."""
    if not run.config.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        return False, ""
    config = json.loads(run.config.read_text())
    checkpoints = {int(p.name.partition("-")[2]): p for p in run.checkpoints.glob("checkpoint-*")}
    for step in [step for step, p in checkpoints.items() if not (p / "trainer_state.json").exists()]:  # written last
        torn = checkpoints.pop(step)
        torn.rename(torn.with_name(f"torn-{torn.name}"))
    reached = max(checkpoints, default=0)
    if 0 < reached < steps and not config.get("staleness", {}).get("value"):
        return True, f"was interrupted; goes on from its checkpoint of step {reached}"
    aside = next(p for n in range(1, 10**6) if not (p := run.path.with_name(f"{run.path.name}.interrupted-{n}")).exists())
    run.path.rename(aside)
    run.path.mkdir()
    return False, f"was interrupted without a checkpoint to go on from; starts anew, and what there was is in {aside}"


class RunFailed(Exception):
    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)
        self.lines = list(lines)


def _command(plan: Plan, arguments: Sequence[str]) -> list[str]:
    module = ["-m", "rlinvariant.cli", "train", *arguments]
    if plan.launch is None:
        return [sys.executable, *module]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--config_file", plan.launch, *module]


def _run(command: Sequence[str], run: RunDir, advance: Any, lock: int) -> None:
    """Start a run and wait for it, with its output in log.txt. Raises RunFailed with the end of it."""
    log = run.path / "log.txt"
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        # In a session of its own, so that ctrl-C reaches it once, from here
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock]
        )
        try:
            while True:
                try:
                    child.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    advance(_last_step(run.metrics))
        finally:
            _stop(child)
    if not run.result.exists():
        text = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
        errors = [line for line in text if line.startswith("error: ")]
        raise RunFailed(errors or [*text[-12:], f"exit code {child.returncode}"])


def _stop(child: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 5), (signal.SIGKILL, None)):
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _last_step(metrics: Path) -> int:
    """Of the last whole row."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**16))
        lines = [line for line in file.read().splitlines(keepends=True)[-2:] if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def _outcome(run: RunDir) -> str:
    result = json.loads(run.result.read_text())
    before, after = (result.get(f"accuracy_{when}") for when in ("before", "after"))
    return "finished" if after is None or before is None else f"accuracy {before:.1%} -> {after:.1%}"


# ---- what came out


def report(path: Path, console: Console) -> None:
    """Write report.html and summary.json, and print the table: the same numbers in all three."""
    page, study = html.write(path)
    _write(path / "summary.json", summary(study))
    tables.show(study, console)
    console.print(f"report: {page}")


def summary(study: Study) -> dict[str, Any]:
    """Every number of the tables with its interval, and where it comes from; null where there is none."""

    def numbers(found: Estimate, measure: Measure) -> dict[str, Any]:
        scale = 100 if measure.style == "percent" else 1
        known = {"mean": scale * found.mean, "low": scale * found.low, "high": scale * found.high}
        return {key: value if math.isfinite(value) else None for key, value in known.items()} | {"seeds": found.n}

    arms = {}
    for arm in study.arms:
        counts = {name: total(arm.rows, f"onpolicy/{name}_tokens") for name in ("mismatched", "compared")}
        arms[arm.name] = {"description": arm.description, "overrides": list(arm.overrides), "tokens": counts}
        arms[arm.name] |= {"measures": {m.title: numbers(arm.estimate(m), m) for m in measured(study)}}
        if study.reference is not None and arm is not study.reference:
            against = {m: arm.against(study.reference, m) for m in measured(study)}
            said = {m.title: numbers(v.difference, m) | {"verdict": v.text} for m, v in against.items()}
            arms[arm.name]["minus exact, by seed"] = said
    first = next((run.environment for _, run in study.runs if run.environment), {})
    environment = {key: first.get(key) for key in ("cpu", "packages", "git", "threads")}
    head = {"command": study.command, "recipe": study.recipe, "steps": study.steps}
    return head | {"seeds": sorted({run.seed for _, run in study.runs}), "environment": environment, "arms": arms}


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")
