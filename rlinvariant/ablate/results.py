"""The results of an ablation: report.html, summary.json, and the table."""

import json
import math
from pathlib import Path
from typing import Any

from rlinvariant.files import write_atomically
from rlinvariant.report import html, tables
from rlinvariant.report.console import Console, total
from rlinvariant.report.stats import Estimate, Measure
from rlinvariant.report.study import Study, measured
from rlinvariant.types import Json, JsonObject


def report(path: Path, console: Console) -> None:
    """Write report.html and summary.json, and print the table; all three have the same numbers."""
    page, study = html.write(path)
    write_json(path / "summary.json", summary(study))
    tables.show(study, console)
    console.print(f"report: {page}")


def summary(study: Study) -> JsonObject:
    """Return every number of the tables with its interval, and where it comes from; None where there is none."""

    def numbers(found: Estimate, measure: Measure) -> dict[str, Any]:
        scale = 100 if measure.style == "percent" else 1
        known = {"mean": scale * found.mean, "low": scale * found.low, "high": scale * found.high}
        finite = {key: value if math.isfinite(value) else None for key, value in known.items()}
        return finite | {"seeds": found.n, "values": [scale * x if math.isfinite(x) else None for x in found.values]}

    arms = {}
    for arm in study.arms:
        counts = {name: total(arm.rows, f"onpolicy/{name}_tokens") for name in ("mismatched", "compared")}
        arms[arm.name] = {"description": arm.description, "overrides": list(arm.overrides), "tokens": counts}
        if routed := tables.flips(arm.rows):
            arms[arm.name] |= {"other experts": {layer: {"mismatched": n, "compared": of} for layer, (n, of) in routed.items()}}
        arms[arm.name] |= {"measures": {m.title: numbers(arm.estimate(m), m) for m in measured(study)}}
        if study.reference is not None and arm is not study.reference:
            against = {m: arm.against(study.reference, m) for m in measured(study)}
            said = {m.title: numbers(v.difference, m) | {"verdict": v.text} for m, v in against.items()}
            arms[arm.name]["minus exact, by seed"] = said
    first = next((run.environment for _, run in study.runs if run.environment), {})
    environment = {key: first.get(key) for key in ("cpu", "packages", "git", "threads")}
    head = {"command": study.command, "recipe": study.recipe, "steps": study.steps}
    return head | {"seeds": sorted({run.seed for _, run in study.runs}), "environment": environment, "arms": arms}


def write_json(path: Path, value: Json) -> None:
    """Write a value as JSON in place of an earlier file."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
