"""Two run directories, compared: did a resumed run end as the run that was never touched?"""

import json
from pathlib import Path
from typing import Any

import numpy as np

STATE = (".safetensors", ".pt", ".pth")
CLOCKS = ("time/", "perf/")
CLOCK_KEYS = ("step_time", *(f"eval_{key}" for key in ("runtime", "samples_per_second", "steps_per_second")))


def differences(run: Path, untouched: Path) -> list[str]:
    """Say in what two finished runs differ: the last checkpoint's bytes, rows but for clocks, rollouts, samples, result."""
    found = []
    for name, part in PARTS.items():
        one, other = part(run), part(untouched)
        assert other, f"{untouched} has no {name}"
        if one != other:
            found.append(f"{name}{_where(one, other)}")
    return found


def checkpoint(run: Path) -> dict[str, bytes]:
    """Return the files of the last checkpoint that hold its state."""
    files = [file for file in last_checkpoint(run).rglob("*") if file.suffix in STATE]
    return {str(file.relative_to(last_checkpoint(run))): file.read_bytes() for file in sorted(files)}


def last_checkpoint(run: Path) -> Path:
    """Return the checkpoint of the highest step; a directory that does not exist, if there is none."""
    found = [path for path in run.glob("checkpoints/checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=run / "no checkpoint")


def rows(run: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says, line by line, without clocks."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS) and k not in CLOCK_KEYS} for line in lines]


def rollouts(run: Path) -> dict[str, dict[str, bytes]]:
    """Return the arrays of every recorded rollout, but for what names directories."""
    found = {}
    for file in sorted(run.glob("rollouts/*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            found[file.name] = {k: arrays[k].tobytes() for k in arrays.files if arrays[k].dtype.kind not in "US"}
    return found


def samples(run: Path) -> dict[str, bytes]:
    """Return the files of completions: the same rows are the same bytes."""
    return {file.name: file.read_bytes() for file in sorted(run.glob("completions/*"))}


def held_out(run: Path) -> dict[str, Any]:
    """Return what result.json says that is no clock."""
    result = json.loads((run / "result.json").read_text())
    return {key: result[key] for key in ("finished", "heldout_reward_before", "heldout_reward_after", "heldout_is_accuracy")}


PARTS = {"checkpoint": checkpoint, "metrics": rows, "rollouts": rollouts, "samples": samples, "result": held_out}


def _where(one: Any, other: Any) -> str:
    """Say where two parts differ first."""
    if isinstance(other, dict):
        return f": {', '.join(sorted(key for key in {*one, *other} if one.get(key) != other.get(key)))}"
    if len(one) != len(other):
        return f": {len(one)} lines, not {len(other)}"
    at = next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
    return f": line {at + 1}{_where(one[at], other[at]) if isinstance(other[at], dict) else ''}"
