"""A long run of the smallest recipe, and what its process held at each step.

python -m tests.reliability.soak STEPS [key=value ...]    prints a line per 50 steps, and the growth
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RECIPE = Path(__file__).with_name("soak_recipe.py")
WARM = 30  # steps after which every cache has been filled: oneDNN's kernels, one for each number of tokens


def soak(steps: int, directory: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train in a process of its own; return what it held at each step, as `soak_recipe.held` says, in the order of steps.

    Raises:
        CalledProcessError: the run did not end well; its output is on stderr.
    """
    file = directory / "held.jsonl"
    saved = [f"trainer.save_steps={max(1, steps // 10)}", "trainer.save_total_limit=2"]
    command = [
        sys.executable,
        "-m",
        "rlinvariant",
        "train",
        f"recipe={RECIPE}",
        "run=soak",
        f"steps={steps}",
        *saved,
        *arguments,
    ]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"SOAK": str(file), "PYTHONPATH": path}
    with (directory / "log").open("wb") as log:
        ended = subprocess.run(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        sys.stderr.write((directory / "log").read_text(errors="replace")[-4000:])
        ended.check_returncode()
    held = {row["step"]: row for row in map(json.loads, file.read_text().splitlines())}  # evaluation's rows are replaced
    return [held[step] for step in range(steps)]


def growth(held: Sequence[dict[str, Any]], since: int) -> float:
    """Return by how many bytes the resident memory grew a step, from step `since` to the last: medians of 5 steps each."""
    first, last = held[since : since + 5], held[-5:]
    grown = median(row["rss"] for row in last) - median(row["rss"] for row in first)
    return grown / (last[0]["step"] - first[0]["step"])


def extremes(held: Sequence[dict[str, Any]], key: str, since: int) -> tuple[int, int]:
    """Return the least and the most of `files` or `threads` since a step, while no checkpoint was being finished."""
    values = [row[key] for row in held[since:] if not row["saving"]]
    return min(values), max(values)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows = soak(int(sys.argv[1]), Path(place), *sys.argv[2:])
    for row in rows[::50]:
        print(f"step {row['step']:5}: {row['rss'] / 2**20:8.1f} MiB, {row['files']} files, {row['threads']} threads")
    per_step = growth(rows, WARM)
    print(f"from step {WARM}: {per_step / 2**10:+.1f} KiB a step, {per_step * 2000 / rows[WARM]['rss']:+.2%} in 2,000 steps")
