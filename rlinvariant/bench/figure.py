"""The figure of costs: time of engines, trainer and whole step on a GPU, as a multiple of stock's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from rlinvariant.bench.tables import Result

OURS, THEIRS = "#1f6f54", "#b9b9b9"


class Bar(NamedTuple):
    """Describes one bar: what was measured, its time over stock's, and whether it is ours or a peer's."""

    label: str
    time: float
    is_ours: bool


def bars(results: Mapping[str, Result]) -> list[Bar]:
    """Return a bar for each time and rate of the results of a GPU that has a target, or is a peer's rate."""
    rows = [row for name in ("sampler", "trainer", "step") for row in results.get(name, {"rows": []})["rows"]]
    return [bar for row in rows if (bar := _bar(row))]


def _bar(row: Result) -> Bar | None:
    if "missing" in row or row["unit"] not in ("tok/s", "s") or row["ratio"] <= 0:
        return None
    if row["target"] is None and (row["bench"] != "peer" or row["unit"] != "tok/s"):
        return None
    label = row["case"].split(";")[0].removeprefix("ours: ")
    return Bar(label, 1 / row["ratio"] if row["unit"] == "tok/s" else row["ratio"], row["bench"] != "peer")


def draw(some: Sequence[Bar], file: Path) -> Figure:
    """Draw horizontal bars and a line at 1, and write them as SVG."""
    figure = Figure(figsize=(8.3, 0.23 * len(some) + 0.6), layout="constrained")
    axes = figure.subplots()
    colours = [OURS if bar.is_ours else THEIRS for bar in some]
    drawn = axes.barh(range(len(some)), [bar.time for bar in some], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_yticks(range(len(some)), [bar.label for bar in some])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time over stock's (line: 1)")
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):  # the same bars give the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
    return figure
