"""Figures: time of engines, trainer and step on a GPU as a multiple of stock's; training with and without drift, by step."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rlinvariant.bench.drift import study_of
from rlinvariant.bench.tables import Result
from rlinvariant.report import stats
from rlinvariant.report.html_charts import window
from rlinvariant.report.panels import column
from rlinvariant.report.study import Arm

OURS, THEIRS = "#1f6f54", "#b9b9b9"
ARMS = ((OURS, "-"), ("#c2410c", "--"), ("#0069a8", ":"), ("#a84a86", "-."))
PANELS = (  # title, keys of the rows, whether the axis is logarithmic
    ("Reward", ("reward",), False),
    ("KL of sampler to trainer, k3, nats", ("onpolicy/kl_k3",), True),
    ("Importance ratio, least and greatest", ("onpolicy/is_ratio/min", "onpolicy/is_ratio/max"), True),
    ("Gradient norm", ("grad_norm",), True),
    ("Entropy, nats per token", ("entropy",), False),
    ("Length of completions, tokens", ("completions/mean_length",), False),
)
POINTS = 150  # of a curve


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
    _save(figure, file)
    return figure


def draw_curves(content: Result, file: Path) -> Figure:
    """Draw six panels by step of what `drift.collect` kept, and write them as SVG: of each arm the mean and its 95 % interval.

    Long runs are averaged over steps as on a run's page. An arm of zeros has no line on a logarithmic axis: it is named below.
    """
    study = study_of(content)
    steps = window(study)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    for axes, (title, keys, is_log) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axes.set_title(title, fontsize=9)
        axes.tick_params(which="both", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log" if is_log else "linear")
        curves = [(arm, look, _curve(arm, key, steps)) for arm, look in zip(study.arms, cycle(ARMS)) for key in keys]
        drawn = [one for one in curves if not is_log or one[2][1].min() > 0]
        for arm, (colour, style), (x, mean, _, _) in drawn:
            axes.plot(x, mean, color=colour, linestyle=style, linewidth=1.4, label=arm.name)
        low, high = axes.get_ylim()
        for _, (colour, _), (x, mean, least, most) in drawn:
            axes.fill_between(
                x, np.maximum(least, mean / 100) if is_log else least, most, color=colour, alpha=0.15, linewidth=0
            )
        least, most = axes.get_ylim()  # of two seeds an interval can be so wide that it would flatten every curve
        bounds = (low * low / high, high * high / low) if is_log else (2 * low - high, 2 * high - low)
        axes.set_ylim(max(least, bounds[0]), min(most, bounds[1]))
        zeros = dict.fromkeys(arm.name for arm, _, curve in curves if is_log and curve[1].max() == 0)
        axes.set_xlabel("step" + (f" ({', '.join(zeros)}: 0 at every step)" if zeros else ""), fontsize=8)
    named = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=len(named), fontsize=9, frameon=False)
    _save(figure, file)
    return figure


def _curve(arm: Arm, key: str, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return at most POINTS steps, and at each the mean over seeds and the ends of its interval."""
    shared = min((len(run.rows) for run in arm.runs), default=0)
    at = np.unique(np.linspace(0, shared - 1, min(shared, POINTS)).astype(int))
    values = np.array([stats.running_mean(column(run.rows[:shared], key), steps) for run in arm.runs])
    mean, low, high = (x[at] for x in stats.curve(values, np.ones(values.shape, bool)))
    return np.array([row["step"] for row in arm.runs[0].rows[:shared]])[at], mean, low, high


def _save(figure: Figure, file: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):  # the same numbers give the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
