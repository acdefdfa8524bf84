"""The page's charts: each as SVG, and beside it the numbers from which the page's script makes one to zoom, smooth and read."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinvariant.errors import UserError
from rlinvariant.report import stats, svg, tables
from rlinvariant.report.completions import Completions
from rlinvariant.report.panels import ON_POLICY, REWARD, Panel, column
from rlinvariant.report.study import Arm, Run, Study, measured
from rlinvariant.text import escaped, plural, printable
from rlinvariant.types import JsonObject

SHORT_RUN_STEPS = 200  # up to so many, every single step can be seen
NUMBERS = 1_000_000  # on a page, of all charts; in longer runs each stretch keeps its least and its greatest
CLOCK_POINTS = 2000  # at which a page knows tokens and time
STACKS = 4  # arms that have a stack of their own
DRAWN_STEPS = 120  # whose completions the distribution of rewards is read from
KINDS_OF_REWARD = 6  # up to so many values, each has a layer of its own


@dataclass(frozen=True)
class Curve:
    """Holds the seeds of one arm in a panel.

    Attributes:
        steps: [S], ascending.
        values: [seeds, S] float64, NaN for no number.
        present: [seeds, S] bool, whether the seed has a row of that step.
    """

    label: str
    style: int
    steps: np.ndarray
    values: np.ndarray
    present: np.ndarray

    def line(self, window: int) -> svg.Line:
        """Return what the SVG draws: the mean over seeds of running means, and its interval."""
        running = np.array([stats.running_mean(row, window) for row in self.values])
        mean, low, high = stats.curve(running, self.present)
        raw = mean if window == 1 else stats.curve(self.values, self.present)[0]
        return svg.Line(self.label, self.style, self.steps, mean, low, high, raw)

    def packed(self, most: int) -> JsonObject:
        """Return the numbers for the page's script, of at most about `most` steps; a missing row is null, no number "-"."""
        at = svg.extremes(self.steps, stats.curve(self.values, self.present)[0], most // 3)
        rows = zip(self.values[:, at].tolist(), self.present[:, at].tolist(), strict=True)
        seeds = [[_short(v) if there else None for v, there in zip(*row, strict=True)] for row in rows]
        return {"label": printable(self.label), "style": self.style, "steps": self.steps[at].tolist(), "seeds": seeds}


def window(study: Study) -> int:
    """Return over how many steps the curves of a long run are averaged, an odd number; 1 for a short one."""
    steps = max((len(run.rows) for _, run in study.runs), default=0)
    return 1 if steps <= SHORT_RUN_STEPS else 2 * round(steps / 100) + 1


def clocks(study: Study) -> str:
    """Return what charts share, as a script element of JSON: each arm's tokens and seconds at its steps, and t quantiles."""
    arms = []
    for arm in study.arms:
        rows = max((run.rows for run in arm.runs), key=len, default=[])
        steps = [int(row["step"]) for row in rows]
        tokens = np.maximum.accumulate(np.nan_to_num(column(rows, "num_tokens")))
        seconds = np.cumsum(np.nan_to_num(column(rows, "step_time")))
        at = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), CLOCK_POINTS)).astype(int)) if steps else []
        known: dict[str, list[float]] = {"step": [0], "tokens": [0], "seconds": [0]}
        for i in at:
            for key, value in (("step", steps[i]), ("tokens", int(tokens[i])), ("seconds", round(float(seconds[i]), 2))):
                known[key].append(value)
        arms.append({"label": printable(arm.name)} | known)
    most = max((len(arm.runs) for arm in study.arms), default=1)
    t = [stats.t_quantile(max(n - 1, 1)) for n in range(most + 1)]
    dashes = [svg.DASHES[i % len(svg.DASHES)] for i in range(max(len(study.arms), svg.COLOURS))]
    return _script({"arms": arms, "t": t, "dashes": dashes, "window": window(study)}, "clocks")


def sections(study: Study) -> dict[str, str]:
    """Return the charts of each section as HTML, {title: figures}; a panel that no run has a number for is left out."""
    found: dict[str, list[str]] = {}
    for panel in (panel for panel in study.panels if panel.section != ON_POLICY):
        drawn = list(_stacks(study, panel)) if panel.kind == "stack" else _curves(study, panel)
        if drawn:
            found.setdefault(panel.section, []).extend(drawn)
    if REWARD in found:
        found[REWARD][3:3] = _distributions(study)
        found[REWARD] += _seeds(study)
    return {title: f'<div class="panels">{"".join(figures)}</div>' for title, figures in found.items()}


def contract(study: Study) -> str:
    """Return the strip about exactness: a line, the panels that are not at their ideal, and those that are, folded."""
    good: dict[str, list[str]] = {}
    bad: dict[str, list[str]] = {}
    for panel in study.panels:
        if panel.section == ON_POLICY and (drawn := _curves(study, panel)):
            (good if is_ideal(study, panel) else bad)[panel.title] = drawn
    if not (good or bad):
        return ""
    arms = [(arm, arm.rows) for arm in study.arms if arm.rows]
    said = []
    for arm, rows in arms:
        good_arm = tables.is_exact(rows)
        name = arm.name if len(study.arms) > 1 else "exact" if good_arm else "not exact"
        said.append(f'<li class="{"good" if good_arm else "bad"}"><b>{escaped(name)}:</b> {escaped(tables.counted(rows))}</li>')
    parts = [f'<ul class="strip">{"".join(said)}</ul>']
    if bad:
        parts.append(f'<div class="panels">{"".join(f for drawn in bad.values() for f in drawn)}</div>')
    if good:
        title = f"{plural(len(good), 'number')} at {'its' if len(good) == 1 else 'their'} ideal at every step"
        shown = [panel for panel in study.panels if panel.title in good]
        title += " that has them" if any(np.isnan(x).any() for panel in shown for x in _values(study, panel)) else ""
        names = ", ".join(good)
        inside = "".join(f for drawn in good.values() for f in drawn)
        summary = f'<summary>{title} <span class="unit">{escaped(names)}</span></summary>'
        parts.append(f'<details class="folded">{summary}<div class="panels">{inside}</div></details>')
    return "".join(parts)


def is_ideal(study: Study, panel: Panel) -> bool:
    """Tell whether every number that any run has in a panel is the panel's ideal one."""
    values = np.concatenate(_values(study, panel))
    values = values[~np.isnan(values)]
    return panel.ideal is not None and bool(len(values)) and bool((values == panel.ideal).all())


def _values(study: Study, panel: Panel) -> list[np.ndarray]:
    return [np.empty(0), *(panel.values(run.rows_of(panel)) for _, run in study.runs if panel.shown_for(run.config))]


def absent(study: Study) -> str:
    """Name the panels that no run has a number for, and those that some runs have none for."""
    none = [p.title for p in study.panels if _wanted(study, p) and not any(_curve(study, p, i) for i in range(len(study.arms)))]
    said = [f"Not drawn, as no run has a number for it: {', '.join(none)}."] if none else []
    for i, arm in enumerate(study.arms if len(study.arms) > 1 else []):
        wanted = [p for p in study.panels if p.title not in none and any(p.shown_for(run.config) for run in arm.runs)]
        if arm.rows and (lacks := [p.title for p in wanted if not _curve(study, p, i)]):
            said.append(f"No number of {arm.name} in: {', '.join(lacks)}.")
    return "".join(f'<p class="small">{escaped(line)}</p>' for line in said)


def figure(title: str, unit: str, notice: str, drawn: str, data: JsonObject | None = None) -> str:
    """Return a figure: its caption, the SVG, and, if a script is to draw it, the numbers."""
    caption = f'<b>{escaped(title)}</b> <span class="unit">{escaped(unit)}</span><span class="notice">{escaped(notice)}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{drawn}{_script(data) if data else ''}</figure>"


def legend(study: Study) -> str:
    """Return the names of the arms with their lines, and how curves are made."""
    lines = [
        f"<li>{svg.swatch(i)}<div><b>{escaped(arm.name)}</b> <span>{escaped(arm.description)}</span></div></li>"
        for i, arm in enumerate(study.arms)
    ]
    seeds, steps = max((len(arm.runs) for arm in study.arms), default=0), window(study)
    curves = f"running means over {steps} steps" if steps > 1 else "each step"
    said = f"Lines: {curves}, mean over seeds; shading: its 95 % interval." if seeds > 1 else f"Lines: {curves}; no intervals."
    if steps > 1:
        said += " Thin lines: single steps, of each pixel column the least and the greatest."
    listed = f'<ul class="legend">{"".join(lines)}</ul>' if len(study.arms) > 1 else ""
    return f'{listed}<div id="controls"></div><p class="small static">{said}</p>'


def _most(study: Study) -> int:
    """Return how many steps a curve may have, so that a page holds about NUMBERS numbers."""
    return max(1000, NUMBERS // max(1, len(study.panels) * sum(len(arm.runs) for arm in study.arms)))


def _wanted(study: Study, panel: Panel) -> bool:
    return any(panel.shown_for(run.config) for _, run in study.runs)


def _curves(study: Study, panel: Panel) -> list[str]:
    """Return the figure of a panel, or nothing where no run has a finite number."""
    curves = [curve for i in range(len(study.arms)) if (curve := _curve(study, panel, i)) is not None]
    if not curves:
        return []
    drawn = svg.chart(
        panel.title, panel.unit, [c.line(window(study) if panel.of == "steps" else 1) for c in curves], panel.scale
    )
    data = {"scale": panel.scale, "smooth": panel.of == "steps", "lines": [curve.packed(_most(study)) for curve in curves]}
    return [figure(panel.title, panel.unit, panel.notice, drawn, data)]


def _curve(study: Study, panel: Panel, index: int) -> Curve | None:
    """Return what an arm has in a panel, if it has a finite number."""
    arm = study.arms[index]
    runs = [rows for run in arm.runs if panel.shown_for(run.config) and (rows := run.rows_of(panel))]
    if not runs:
        return None
    steps = np.array(sorted({row["step"] for rows in runs for row in rows}))
    values, present = np.full((len(runs), len(steps)), math.nan), np.zeros((len(runs), len(steps)), bool)
    for i, rows in enumerate(runs):
        at = np.searchsorted(steps, [row["step"] for row in rows])
        values[i, at], present[i, at] = panel.values(rows), True
    curve = Curve(arm.name, index, steps, values, present)
    return curve if np.isfinite(stats.curve(values, present)[0]).any() else None


def _stacks(study: Study, panel: Panel) -> Iterator[str]:
    """Yield a stack for each of the first arms: of its first seed, the parts that are anywhere more than 0."""
    for arm in study.arms[:STACKS]:
        run = next((run for run in arm.runs if run.rows and panel.shown_for(run.config)), None)
        if run is not None:
            rows = run.rows_of(panel)
            layers = {key.rpartition("/")[2]: np.nan_to_num(column(rows, key)) for key in panel.keys}
            layers = {name: values for name, values in layers.items() if values.any()}
            steps = np.array([row["step"] for row in rows])
            yield from _stack(study, arm, run, (panel.title, panel.unit, panel.notice), steps, layers)


def _distributions(study: Study) -> Iterator[str]:
    """Yield, of each of the first arms, what share of a step's completions had which reward, of steps spread over the run."""
    said = (
        "Distribution of rewards",
        "fraction of completions",
        "Which rewards were given: a mean of 0.5 can be all or nothing.",
    )
    for arm in study.arms[:STACKS]:
        for run in arm.runs[:1]:
            try:
                drawn = Completions(run.path).rewards(DRAWN_STEPS)
            except (UserError, OSError):  # said where the completions are shown
                continue
            yield from _stack(study, arm, run, said, *_layers(drawn))


def _stack(
    study: Study, arm: Arm, run: Run, said: tuple[str, str, str], steps: np.ndarray, layers: dict[str, np.ndarray]
) -> Iterator[str]:
    """Yield the figure of layers [steps] of one run, the first at the bottom, unless there are none."""
    if not layers:
        return
    title, unit, notice = said
    if len(study.arms) > 1:
        title += f": {arm.name}" + (f", seed {run.seed}" if len(arm.runs) > 1 else "")
    if len(study.arms) > STACKS:
        notice += f" Drawn of the first {STACKS} arms."
    at = svg.extremes(steps, np.sum(list(layers.values()), axis=0), _most(study) // 3)
    steps, layers = steps[at], {name: values[at] for name, values in layers.items()}
    lines = [
        {"label": printable(name), "style": i, "steps": steps.tolist(), "seeds": [[_short(v) for v in values.tolist()]]}
        for i, (name, values) in enumerate(layers.items())
    ]
    data = {"scale": "from zero", "smooth": True, "stack": True, "arm": printable(arm.name), "lines": lines}
    yield figure(title, unit, notice, svg.stack(title, unit, steps, layers), data)


def _layers(drawn: dict[int, list[float]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return steps and the shares [steps] of each value of reward, or of each fifth of their range, the highest first."""
    every = np.array(sorted({value for values in drawn.values() for value in values}))
    if not len(every):
        return np.array([]), {}
    if len(every) <= KINDS_OF_REWARD:
        names, edges = [f"{value:.4g}" for value in every], np.append(every, math.inf)
    else:
        edges = np.linspace(every[0], every[-1], KINDS_OF_REWARD)
        names = [f"{a:.3g} to {b:.3g}" for a, b in zip(edges, edges[1:], strict=False)]
        edges[-1] = math.inf
    shares = np.array([np.histogram(np.array(values), edges)[0] / len(values) for values in drawn.values()])
    return np.array(list(drawn)), dict(reversed(list(zip(names, shares.T, strict=True))))


def _seeds(study: Study) -> Iterator[str]:
    """Yield one number of every run, a row for each arm: an interval hides which seed collapsed."""
    if study.is_single:
        return
    for measure in (m for m in measured(study) if m in (stats.REWARD, stats.HELD_OUT, stats.ACCURACY)):
        rows = []
        for index, arm in enumerate(study.arms):
            seeds = [value for run in arm.runs if math.isfinite(value := measure.of(run.rows, run.result))]
            if seeds:
                rows.append((arm.name, index, stats.estimate(seeds), seeds))
        if rows:
            title, _, unit = measure.title.partition(", ")
            notice = "Dots: seeds; upright: their mean; line: 95 % interval."
            notice += "" if measure is stats.REWARD else f" After training, greedy.{_before(study, measure)}"
            yield figure(title, unit, notice, svg.dots(title, rows, measure.style == "percent"))


def _before(study: Study, measure: stats.Measure) -> str:
    """Say where held-out rewards were before training; "" where no run says it."""
    before = [v for _, run in study.runs if (v := run.result.get("heldout_reward_before")) is not None]
    ends = [tables.number(value, measure.style) for value in (min(before), max(before))] if before else []
    return f" Before it: {' to '.join(dict.fromkeys(ends))}." if ends else ""


def _short(value: float) -> float | int | str:
    """Return a number in six digits, "-" for one that is none."""
    if not math.isfinite(value):
        return "-"
    short = float(f"{value:.6g}")
    if value != short and (short == 0 or short == 1):  # no rounding makes 0 or 1 of what is neither
        return value
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _script(data: dict[str, Any], name: str = "") -> str:
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json"{f" id={name}" if name else ""}>{text}</script>'
