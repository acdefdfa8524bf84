"""The words and tables of a report, for the page and for the terminal alike."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from statistics import mean
from typing import Literal

from rlinvariant import held_out
from rlinvariant.report.console import Console, coverage, integer, total
from rlinvariant.report.panels import FLIPS, of_evaluations
from rlinvariant.report.stats import ACCURACY, HELD_OUT, LAST, NO_COMMON_SEED, REWARD, Estimate, Measure, Row, Verdict
from rlinvariant.report.study import Arm, Run, Study, measured
from rlinvariant.text import plural

HEAD_WIDTH, SAID_WIDTH = 14, 24  # characters, of a title and of what stands below a number

ANY_LAYER = "any layer"

Style = Literal["scientific", "percent", "near one"] | int


@dataclass(frozen=True)
class Cell:
    """Holds a number, and the note beneath it."""

    text: str
    said: str = ""
    differs: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def lines(self, width: int | None = None) -> list[str]:
        """Lay the table out in columns, or, where these are wider than `width` characters, in a block for each row."""
        rows = [[textwrap.wrap(title, HEAD_WIDTH) for title in self.head]]
        rows += [[[cell.text, *textwrap.wrap(cell.said, SAID_WIDTH)] for cell in row] for row in self.rows]
        widths = [max(map(len, chain(*column))) for column in zip(*rows, strict=True)]
        if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
            return [line for row in self.rows for line in self._block(row, width)]
        return [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
            for row in rows
            for first, *others in zip_longest(*row, fillvalue="")
        ]

    def _block(self, row: Sequence[Cell], width: int) -> list[str]:
        """Write the name of a row, and below it a line for each column: its title and the cell."""
        indent = max(map(len, self.head[1:])) + 4
        lines = [row[0].text]
        for title, cell in zip(self.head[1:], row[1:], strict=True):
            text = f"{cell.text}  {cell.said}".rstrip()
            lines += textwrap.wrap(text, width, initial_indent=f"  {title}".ljust(indent), subsequent_indent=" " * indent)
        return lines


def show(study: Study, console: Console) -> None:
    """Print the notes, the tables and the outcome: what the page has, without its curves."""
    for note in study.notes:
        console.print(f"note: {note}")
    for table in every(study):
        console.print("")
        for line in [*table.lines(console.width), table.caption]:
            console.print(line)
    console.print("")
    for who, what in sentences(study):
        console.print(f"{who}: {what}")


def contract(rows: Sequence[Row]) -> str:
    """Say what a run prints of its contract: `mismatched 0 / 484,965 tokens, coverage 1`."""
    if not rows:
        return "no token compared"
    mismatched, compared = (total(rows, f"onpolicy/{name}_tokens") for name in ("mismatched", "compared"))
    return f"mismatched {integer(mismatched)} / {integer(compared)} tokens, coverage {coverage(rows)}"


def counted(rows: Sequence[Row]) -> str:
    """Say `0 / 484,965 tokens`, and coverage where it is not 1."""
    mismatched, compared = (integer(total(rows, f"onpolicy/{name}_tokens")) for name in ("mismatched", "compared"))
    covered = coverage(rows)
    return f"{mismatched} / {compared} tokens" + ("" if covered == "1" else f", coverage {covered}")


def is_exact(rows: Sequence[Row]) -> bool:
    """Tell whether no token of these rows differs, and every sampled one was compared."""
    return total(rows, "onpolicy/mismatched_tokens") == 0 and coverage(rows) == "1"


def sentences(study: Study) -> list[tuple[str, str]]:
    """Say the outcome, as pairs of a subject and what holds of it."""
    said = _learned(study.arms[0].runs[0]) if study.is_single else []
    if study.is_single:
        return [*said, ("On policy", contract(study.arms[0].rows))]
    reference = study.reference
    first = reference or study.arms[0]
    others = [arm for arm in study.arms if arm is not first and arm.rows]
    if reference is not None and others:
        said += [
            (f"{measure.title.split(',')[0]} against {reference.name}", _compared(others, reference, measure))
            for measure in (REWARD, HELD_OUT, ACCURACY)
            if measure in measured(study)
        ]
    said.append((first.name, contract(first.rows)))
    if len(others) <= 3:
        return said + [(arm.name, contract(arm.rows)) for arm in others]
    counts = {arm.name: total(arm.rows, "onpolicy/mismatched_tokens") for arm in others}
    groups = {
        "mismatched tokens in": [name for name, count in counts.items() if count],
        "none in": [name for name, count in counts.items() if count == 0],
        "not counted in": [name for name, count in counts.items() if count is None],
    }
    return [*said, ("Other arms", "; ".join(f"{what} {', '.join(names)}" for what, names in groups.items() if names))]


def _learned(run: Run) -> list[tuple[str, str]]:
    """Say what a run has learned: its reward, and what its evaluations found."""
    said = []
    rewards = [row["reward"] for row in run.rows if row.get("reward") is not None]
    if rewards and all(map(math.isfinite, rewards)):
        ends = [rewards[:LAST], rewards[-LAST:]] if len(rewards) > LAST else [rewards]
        means = [number(mean(values), 3) for values in ends]
        of = f"the first {LAST} steps, {means[1]} of the last {LAST}" if len(means) > 1 else plural(len(rewards), "step")
        said.append(("Reward", f"mean {means[0]} of {of}"))
    if (known := held_out.said(run.result)) is not None:
        said.append((f"Held-out {known[0]}", f"{known[1]} before, {known[2]} after, greedy"))
    for panel in of_evaluations(run.evaluations):
        rows = run.rows_of(panel)
        if panel.keys[0] != "heldout/reward":
            points = [f"{number(row[panel.keys[0]], 3)} at step {row['step']}" for row in (rows[0], rows[-1])]
            said.append((panel.title, f"{', '.join(dict.fromkeys(points))}; {plural(len(rows), 'evaluation')}"))
    return said


def _compared(others: Sequence[Arm], reference: Arm, measure: Measure) -> str:
    """Write `no difference seen in a, b; lower in c (−0.03 ± 0.01); 3 seeds`."""
    groups: dict[str, list[str]] = {}
    seeds = set()
    for arm in others:
        found = arm.against(reference, measure)
        seeds.add(found.difference.n)
        name = arm.name + (f" ({_difference(found, measure)})" if found.text in ("higher", "lower") else "")
        groups.setdefault(found.text, []).append(name)
    if len(others) > 3 and set(groups) == {"no difference seen"}:
        groups = {"no difference seen": ["any other arm"]}
    where = {text: f"{text} in {', '.join(names)}" for text, names in groups.items()}
    if set(groups) == {"one seed: no interval"}:
        arms = [arm for arm in (reference, *others) if len(arm.runs) == 1]
        means = ", ".join(f"{arm.name} {number(arm.estimate(measure).mean, measure.style)}" for arm in arms)
        return "one seed: no interval, no verdict" + (f" ({means})" if len(arms) == len(others) + 1 else "")
    if set(groups) == {NO_COMMON_SEED}:
        return where[NO_COMMON_SEED]
    some = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else plural(seeds.pop(), "seed")
    return f"{'; '.join(where.values())} (differences over the same {some})"


def every(study: Study) -> list[Table]:
    """Return all tables of a study, in the order in which they are read."""
    found = (summary(study), differences(study), routers(study))
    return [table for table in found if table is not None]


def summary(study: Study, measures: Sequence[Measure] | None = None) -> Table:
    """Make a line for each arm: counts and extremes over its runs, of every measure the mean over seeds ± its interval.

    Args:
        measures: by default all that the runs have.
    """
    measures = measured(study) if measures is None else measures
    head = ["Arm", "Seeds × steps", "Mismatched / tokens", "Ratio, least … greatest"]
    rows = []
    for arm in study.arms:
        kept = arm.rows
        counts = [integer(total(kept, f"onpolicy/{name}_tokens")) if kept else "–" for name in ("mismatched", "compared")]
        extremes = [_extreme(kept, f"onpolicy/is_ratio/{name}", pick) for name, pick in (("min", min), ("max", max))]
        lengths = sorted({len(run.rows) for run in arm.runs}) or [0]
        steps = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
        rows.append(
            [
                Cell(arm.name),
                Cell(f"{len(arm.runs)} × {steps}"),
                Cell(" / ".join(counts), f"coverage {coverage(kept)}" if kept else ""),
                Cell(" … ".join(extremes)),
                *(Cell(_estimate(arm.estimate(m), m.style, len(arm.runs))) for m in measures),
            ]
        )
    caption = "Counts and extremes over all steps and seeds; other columns: mean over seeds ± half of the 95 % interval."
    if any(arm.estimate(m).is_wide for arm in study.arms for m in measures):
        caption += " Where that half is more than the mean: the values of the seeds."
    if study.is_single:
        caption = "Counts and extremes over all steps; other columns of this one run: no interval."
    return Table(caption, [*head, *(m.title for m in measures)], rows)


def differences(study: Study, measures: Sequence[Measure] | None = None) -> Table | None:
    """Make a line for each arm but the exact one: arm minus exact, paired by seed; None without an exact arm.

    Args:
        measures: as for `summary`.
    """
    reference = study.reference
    if reference is None or len(study.arms) < 2:
        return None
    measures = measured(study) if measures is None else measures
    rows = []
    for arm in study.arms:
        if arm is not reference:
            found = [arm.against(reference, m) for m in measures]
            rows.append(
                [
                    Cell(f"{arm.name} − {reference.name}"),
                    *(
                        Cell(_difference(v, m), v.text + _of(v, arm), v.text in ("higher", "lower"))
                        for v, m in zip(found, measures, strict=True)
                    ),
                ]
            )
    caption = "Differences of runs with the same seed, over the steps that both have: mean ± half of the 95 % interval."
    return Table(caption, [f"Arm − {reference.name}", *(m.title for m in measures)], rows)


def routers(study: Study) -> Table | None:
    """Make a line for each layer with experts: the tokens that sampler and trainer sent to other experts there, in each arm.

    None where no run counts them. A dash: the arm does not.
    """
    counted = [flips(arm.rows) for arm in study.arms]
    layers = sorted(set().union(*counted), key=lambda layer: (layer != ANY_LAYER, len(layer), layer))
    if not layers:
        return None
    rows = [[Cell(layer), *(_flips(found.get(layer)) for found in counted)] for layer in layers]
    caption = (
        "Tokens that sampler and trainer sent to other experts, of those compared, over all steps and seeds, and their share; "
        "layers with experts, from 0."
    )
    return Table(caption, ["Other experts", *(arm.name for arm in study.arms)], rows)


def flips(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Return, for each layer with experts and for any, how many tokens went to other experts, of how many compared ones.

    Both are sums over the rows that count them; empty for a model without experts.
    """
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        name, layer = key[: len(FLIPS)], key[len(FLIPS) + 1 :]
        if name == FLIPS and (key == FLIPS or layer.isdecimal()):
            counted = [row for row in rows if row.get(key) is not None]
            many, compared = total(counted, key), total(counted, "onpolicy/compared_tokens")
            if many is not None and compared is not None:
                found[f"layer {layer}" if layer else ANY_LAYER] = many, compared
    return found


def _flips(found: tuple[int, int] | None) -> Cell:
    if found is None:
        return Cell("–")
    many, compared = found
    return Cell(f"{integer(many)} / {integer(compared)}", number(many / compared, "scientific") if many and compared else "")


def _of(found: Verdict, arm: Arm) -> str:
    n = found.difference.n
    return f" ({n} of {plural(len(arm.runs), 'seed')})" if 1 < n < len(arm.runs) else ""


def _extreme(rows: Iterable[Row], key: str, pick) -> str:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return number(pick(values), "near one") if values and not any(map(math.isnan, values)) else "–"


def _estimate(found: Estimate, style: Style, runs: int) -> str:
    if not math.isfinite(found.mean):
        return "–"
    some = f" (n = {found.n})" if found.n != runs else ""
    if found.is_wide:
        return ", ".join(number(value, style) for value in sorted(found.values, reverse=True)) + some
    return _with_interval(found, style) + some


def _difference(found: Verdict, measure: Measure) -> str:
    """Write a difference with its sign. A difference of numbers near 1 is not near 1."""
    style = "scientific" if measure.style == "near one" else measure.style
    if not math.isfinite(found.difference.mean):
        return "–"
    text = _with_interval(found.difference, style)
    return text if found.difference.mean <= 0 else "(+" + text[1:] if text[0] == "(" else "+" + text


def _with_interval(found: Estimate, style: Style) -> str:
    half = found.half
    if not found.has_interval or half == 0:
        return number(found.mean, style)
    if style == "scientific" and found.mean:
        power = math.floor(math.log10(max(abs(found.mean), half)))
        return f"({_signed(found.mean / 10.0**power, 2)} ± {half / 10.0**power:.2f})e{power:+03d}".replace("e-", "e−")
    if style == "near one":
        style = max(4, -math.floor(math.log10(half)))
    return f"{number(found.mean, style)} ± {number(half, style)}"


def number(value: float, style: Style) -> str:
    """Write a number so that no rounding makes 0 or 1 of what is neither."""
    if style == "percent":
        return _signed(100 * value, 1)
    if style == "scientific":
        return "0" if value == 0 else f"{value:.2e}".replace("-", "−")
    if style == "near one":
        if value in (0, 1) or not math.isfinite(value):
            return f"{value:g}"
        if f"{value:.5f}" == "1.00000":
            return f"1 {'−' if value < 1 else '+'} {abs(value - 1):.1e}".replace("e-", "e−")
        style = "scientific" if value < 0.001 else 5 if 0.999 < value < 1.001 else 3
        return number(value, style)
    return _signed(value, style)


def _signed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", "−")
