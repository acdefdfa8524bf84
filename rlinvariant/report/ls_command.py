"""`rlinvariant ls`: the runs that are there, the newest first."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rlinvariant.errors import UserError, one_line
from rlinvariant.files import RUNS

DESCRIPTION = """List the runs under a directory, those of ablations too, the newest first: name, recipe, steps, the mean
reward of the last ten steps, mismatched tokens of those compared, how it ended, and when."""
STARTED = ("environment.json", "metrics.jsonl")  # what tells a run; the second is there from its first step on
EXAMPLE = """rlinvariant ls
rlinvariant ls elsewhere/runs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ls`."""
    parser.add_argument("path", nargs="?", default=str(RUNS), metavar="DIR", help="where to look; by default runs/")


def run(options: argparse.Namespace) -> None:
    """Print the table. Raises UserError if the directory is not there, or holds no run."""
    from rlinvariant.report.console import Console
    from rlinvariant.report.tables import Cell, Table

    place = Path(options.path)
    if not place.is_dir():
        raise UserError(f"{place}: no such directory; start a run here, or name the directory of some")
    runs = found(place)
    if not runs:
        raise UserError(f"{place}: holds no run; rlinvariant train recipe=arithmetic makes one")
    console = Console()
    head = ["Run", "Recipe", "Steps", "Reward", "Mismatched / tokens", "State", "When"]
    listed = [[Cell(text) for text in _row(path, place)] for path in runs]
    for line in Table("", head, listed).lines(console.width):
        console.print(line)


def found(place: Path) -> list[Path]:
    """Return the directories of runs at a depth of at most three, the newest first; hidden ones are none."""
    runs = {}
    for depth in ("*", "*/*", "*/*/*"):
        for name in STARTED:
            for path in (file.parent for file in place.glob(f"{depth}/{name}")):
                if not any(part.startswith(".") for part in path.relative_to(place).parts):
                    runs[path] = _changed(path)
    return sorted(runs, key=lambda path: -runs[path])


def _changed(path: Path) -> float:
    """Return when a run last wrote a row, or before its first one, when it began."""
    found = (path / name for name in reversed(STARTED))
    return next((os.stat(file).st_mtime for file in found if file.exists()), 0.0)


def _row(path: Path, place: Path) -> Sequence[str]:
    """Return the cells of a run; one that cannot be read has the reason in place of its numbers."""
    from rlinvariant.report import tables
    from rlinvariant.report.stats import REWARD
    from rlinvariant.report.study import load_run

    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(_changed(path)))
    name = str(path.relative_to(place))
    try:
        run = load_run(path)
    except (UserError, OSError) as error:
        return [name, "–", "–", "–", "–", one_line(error).removeprefix(f"{path}/"), when]
    steps = f"{len(run.rows):,}" + (f" / {run.setting('steps'):,}" if isinstance(run.setting("steps"), int) else "")
    state = "finished" if run.finished else str(run.result.get("outcome") or "no end yet")
    counts = tables.counted(run.rows) if run.rows else "–"
    reward = tables.number(value, 3) if (value := REWARD.of(run.rows, run.result)) == value else "–"
    return [name, str(run.setting("recipe") or "–"), steps, reward, counts.replace(" tokens", ""), state, when]
