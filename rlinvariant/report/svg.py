"""Curves with intervals, and dots with intervals, as inline SVG. Colours are CSS variables of the page."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlinvariant.report.panels import Scale
from rlinvariant.report.stats import Estimate
from rlinvariant.text import escaped, percent

WIDTH, HEIGHT = 520, 240
LEFT, TOP, BOTTOM = 66, 10, 34
ZERO = 20  # height of the band that shows an exact 0 on a log axis
GAP = 9  # between that band and the axis
LABEL = 13  # distance of two direct labels
COLOURS = 8
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "14 3", "5 2 1.5 2 1.5 2", "4 6", "12 3 4 3", "1 4", "18 3 2 3 2 3", "8 6")
"""Dashes of the n-th line; with COLOURS they repeat together only after 88 lines."""


@dataclass(frozen=True)
class Line:
    """Holds a curve over the seeds of one arm. All arrays are [steps]; NaN leaves a gap.

    `raw` is the mean of each step by itself. In a long run `mean`, `low` and `high` are those of running means, and `raw` is
    drawn thin beneath them; else `raw` is `mean`.
    """

    label: str
    style: int
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: np.ndarray


@dataclass(frozen=True)
class Axis:
    """Holds a vertical axis: `place(value)` is a y coordinate, NaN for what it cannot show."""

    place: Callable[[np.ndarray], np.ndarray]
    ticks: Sequence[tuple[float, str]]  # (value, label as SVG)
    has_zero_band: bool
    name: str  # "log" where it is


def style(index: int) -> str:
    """Return the classes and the dash of the n-th arm's strokes."""
    dash = DASHES[index % len(DASHES)]
    return f'class="line c{index % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def swatch(index: int) -> str:
    """Draw a sample of a line, for a legend."""
    return f'<svg class="swatch" viewBox="0 0 44 10" aria-hidden="true"><path {style(index)} d="M2 5H42"/></svg>'


def chart(title: str, unit: str, lines: Sequence[Line], scale: Scale) -> str:
    """Draw an SVG of `lines`, labelled at their ends when there are several."""
    labels = len(lines) > 1
    right = 14 + (min(160, 12 + 6.2 * max(len(line.label) for line in lines)) if labels else 0)
    x0, x1 = LEFT, WIDTH - right
    first, last = _span([line.steps for line in lines])
    thin = [_thinned(line, first, last, int(x1 - x0)) for line in lines]
    axis = _axis(thin, scale)

    def across(steps: np.ndarray) -> np.ndarray:
        return x0 + (np.asarray(steps, float) - first) / max(last - first, 1) * (x1 - x0)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}, '
        f'{escaped(unit)}, against the step">'
    ]
    for value, text in axis.ticks:
        y = float(axis.place(np.array([value]))[0])
        parts.append(
            f'<path class="grid" d="M{x0} {y:.1f}H{x1:.1f}"/><text class="tick" x="{x0 - 7}" y="{y + 4:.1f}">{text}</text>'
        )
    floor = HEIGHT - BOTTOM
    if axis.has_zero_band:
        parts.append(f'<rect class="zero" x="{x0}" y="{floor - ZERO}" width="{x1 - x0:.1f}" height="{ZERO}"/>')
        parts.append(f'<text class="tick" x="{x0 - 7}" y="{floor - ZERO / 2 + 4}">exactly 0</text>')
    parts += _step_axis(first, last, x0, x1)
    drawn = [(line, across(line.steps), [axis.place(x) for x in (line.mean, line.low, line.high)]) for line in thin]
    for line, x, (_, low, high) in drawn:
        if path := _band(x, low, high, axis, line):
            parts.append(f'<path class="band c{line.style % COLOURS}" d="{path}"/>')
    for line, x, _ in drawn:
        if line.raw is not line.mean:
            parts.append(f'<path class="raw c{line.style % COLOURS}" d="{_curve(x, axis.place(line.raw))}"/>')
    for line, x, (y, _, _) in reversed(drawn):  # the first, which the others are compared with, on top
        parts.append(f'<path {style(line.style)} data-label="{escaped(line.label)}" d="{_curve(x, y)}"/>')
    if labels:
        parts += _end_labels(drawn, x1, floor)
    return "".join([*parts, "</svg>"])


def stack(title: str, unit: str, steps: np.ndarray, layers: Mapping[str, np.ndarray]) -> str:
    """Draw layers [steps] on top of each other as an SVG, the first at the bottom, each named at its right end."""
    x0, x1, floor = LEFT, WIDTH - 14 - min(160, 12 + 6.2 * max(len(name) for name in layers)), HEIGHT - BOTTOM
    first, last = float(steps.min()), float(steps.max())
    at = extremes(steps, np.sum(list(layers.values()), axis=0), int(x1 - x0))
    x = x0 + (steps[at] - first) / max(last - first, 1) * (x1 - x0)
    if len(at) == 1:  # an area needs two places
        at, x = np.repeat(at, 2), np.array([x0, x1])
    tops = np.cumsum([values[at] for values in layers.values()], axis=0)
    _, high, ticks = _linear(0.0, float(tops[-1].max()) or 1.0)
    y = floor - tops / high * (floor - TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}, {escaped(unit)}">']
    for value in ticks:
        place = floor - value / high * (floor - TOP)
        parts.append(f'<path class="grid" d="M{x0} {place:.1f}H{x1:.1f}"/>')
        parts.append(f'<text class="tick" x="{x0 - 7}" y="{place + 4:.1f}">{_decimal(value, ticks)}</text>')
    below = np.full(len(at), float(floor))
    for i, (name, top) in enumerate(zip(layers, y, strict=True)):
        outline = f"M{_points(x, top)} {_points(x[::-1], below[::-1])}Z"
        parts.append(f'<path class="layer c{i % COLOURS}" data-label="{escaped(name)}" d="{outline}"/>')
        below = top
    ends = [(float(top[-1]), i, name) for i, (name, top) in enumerate(zip(layers, y, strict=True))][::-1]
    for place, (_, i, name) in zip(_apart([end for end, _, _ in ends], TOP, floor), ends, strict=True):
        label = escaped(_short(name))
        parts.append(f'<text class="label c{i % COLOURS}" x="{x1 + 11:.1f}" y="{place + 4:.1f}">{label}</text>')
    return "".join([*parts, *_step_axis(first, last, x0, x1), "</svg>"])


def _step_axis(first: float, last: float, x0: float, x1: float) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for step in _whole_ticks(first, last):
        x = x0 + (step - first) / max(last - first, 1) * (x1 - x0)
        yield f'<path class="axis" d="M{x:.1f} {floor}v4"/><text class="step" x="{x:.1f}" y="{floor + 16}">{step:,}</text>'
    yield f'<path class="axis" d="M{x0} {floor}H{x1:.1f}"/><text class="name" x="{x1:.1f}" y="{HEIGHT - 5}">step</text>'


def dots(title: str, rows: Sequence[tuple[str, int, Estimate, Sequence[float]]], in_percent: bool = True) -> str:
    """Draw a row for each (label, style, estimate, value of each seed): the mean with its interval, and the seeds beneath."""
    left = 20 + 6.4 * max(len(label) for label, *_ in rows)
    height = 22 * len(rows) + 40
    factor = 100 if in_percent else 1
    values = [v * factor for _, _, e, seeds in rows for v in (*seeds, e.low, e.high) if math.isfinite(v)]
    low, high, ticks = _linear(min(values), max(values))
    x0, x1 = left, WIDTH - 70

    def across(value: float) -> float:
        return x0 + (value * factor - low) / (high - low) * (x1 - x0)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(title)}">']
    for value in ticks:
        x = across(value / factor)
        label = _decimal(value, ticks)
        parts.append(
            f'<path class="grid" d="M{x:.1f} 4V{height - 30}"/><text class="step" x="{x:.1f}" y="{height - 14}">{label}</text>'
        )
    for i, (label, index, found, seeds) in enumerate(rows):
        y = 22 * i + 16
        parts.append(f'<text class="row" x="{left - 10:.1f}" y="{y + 4}">{escaped(label)}</text>')
        parts += [f'<circle class="seed c{index % COLOURS}" cx="{across(s):.1f}" cy="{y}" r="2.6"/>' for s in seeds]
        if found.has_interval:
            parts.append(f'<path class="line c{index % COLOURS}" d="M{across(found.low):.1f} {y}H{across(found.high):.1f}"/>')
        if math.isfinite(found.mean):
            parts.append(f'<path class="mean c{index % COLOURS}" d="M{across(found.mean):.1f} {y - 6}v12"/>')
            mean = percent(found.mean) if in_percent else f"{found.mean:.3f}".replace("-", "−")
            parts.append(f'<text class="tick" x="{WIDTH - 4}" y="{y + 4}">{mean}</text>')
    return "".join(parts) + "</svg>"


def _span(steps: Sequence[np.ndarray]) -> tuple[float, float]:
    every = np.concatenate([s for s in steps if len(s)])
    return float(every.min()), float(every.max())


def extremes(steps: np.ndarray, values: np.ndarray, columns: int) -> np.ndarray:
    """Return the indices [n] of at most three points in each of `columns` stretches: the least, the greatest, and a gap.

    So none of them is lost. Of up to two steps a column, all.
    """
    if len(steps) <= 2 * columns:
        return np.arange(len(steps))
    column = np.minimum(((steps - steps[0]) / (steps[-1] - steps[0]) * columns).astype(int), columns - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(column)) - 1
    known = np.isfinite(values)
    least = np.lexsort((np.where(known, values, math.inf), column))[starts]
    most = np.lexsort((np.where(known, values, -math.inf), column))[ends]
    _, gaps = np.unique(column[~known], return_index=True)
    return np.unique(np.concatenate([least, most, np.flatnonzero(~known)[gaps]]))


def _thinned(line: Line, first: float, last: float, columns: int) -> Line:
    """Keep at most three points a pixel column."""
    at = extremes(line.steps, line.raw, max(1, round(columns * (line.steps[-1] - line.steps[0]) / max(last - first, 1))))
    arrays = (line.steps, line.mean, line.low, line.high, line.raw)
    steps, mean, low, high, raw = (x[at] for x in arrays)
    return Line(line.label, line.style, steps, mean, low, high, mean if line.raw is line.mean else raw)


def _axis(lines: Sequence[Line], scale: Scale) -> Axis:
    """Make an axis for all means and most of the bands: with few seeds some are so wide that they would flatten every curve."""
    means = np.concatenate([line.raw[np.isfinite(line.raw)] for line in lines])
    room = float(np.ptp(means)) if len(means) else 0.0
    bands = [np.quantile(x[np.isfinite(x)], q) for e in lines for x, q in ((e.low, 0.1), (e.high, 0.9)) if np.isfinite(x).any()]
    every = np.concatenate([means, np.clip(bands, means.min() - room, means.max() + room) if room else bands])
    floor = HEIGHT - BOTTOM
    if scale == "log and zero":
        positive = means[means > 0]
        top = max(every.max(initial=0.0), 0.0)
        # without any: some decades to be seen to be empty
        low, high = (-8, 0) if not len(positive) else (math.floor(math.log10(positive.min())), math.ceil(math.log10(top)))
        high = max(high, low + 1)
        return Axis(_log(low, high, floor - ZERO - GAP, zero_at=floor - ZERO / 2), _decades(low, high), True, "log")
    if scale == "log" and len(means) and means.min() > 0 and means.max() / means.min() >= 10:
        low, high = math.floor(math.log10(means.min())), math.ceil(math.log10(every.max()))
        return Axis(_log(low, high, floor - 4, zero_at=math.nan), _decades(low, high), False, "log")
    values = every if len(every) else np.array([0.0, 1.0])
    least, most = float(values.min()), float(values.max())
    if scale == "from zero":
        least, most = min(0.0, means.min(initial=0.0)), max(0.0, most) or 1.0  # not where a band alone is negative
    low, high, ticks = _linear(least, most)

    def place(value: np.ndarray) -> np.ndarray:
        return np.clip(floor - 6 - (value - low) / (high - low) * (floor - 6 - TOP), TOP - 4, floor)

    return Axis(place, [(tick, _decimal(tick, ticks)) for tick in ticks], False, "")


def _log(low: int, high: int, floor: float, zero_at: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a scale of powers of ten, `low` to `high`; smaller values stand at the floor, an exact 0 at `zero_at`."""

    def place(value: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.clip(np.log10(np.where(value > 0, value, math.nan)), low, high)
        y = floor - (exponent - low) / (high - low) * (floor - TOP)
        return np.where(value == 0, zero_at, np.where(value < 0, floor, y))

    return place


def _decades(low: int, high: int) -> list[tuple[float, str]]:
    every = -(-(high - low) // 5)
    exponents = range(high, low - 1, -every)
    return [(10.0**e, f'10<tspan dy="-4" class="power">{e}</tspan>'.replace(">-", ">−")) for e in exponents]


def _linear(least: float, most: float) -> tuple[float, float, list[float]]:
    """Return (low, high, ticks): about four ticks at 1, 2 or 5 times a power of ten, and an axis that takes in all values."""
    span = most - least
    if span <= 1e-9 * max(abs(most), abs(least)) or span == 0:
        span = abs(most) * 0.2 or 1.0
        least, most = least - span / 2, most + span / 2
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    ticks = [k * step for k in range(math.ceil(least / step - 1e-6), math.floor(most / step + 1e-6) + 1)]
    return min(least, *ticks), max(most, *ticks), ticks


def _decimal(value: float, ticks: Sequence[float]) -> str:
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(value) or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{min(decimals, 9)}f}".replace("-", "−")


def _whole_ticks(first: float, last: float) -> list[int]:
    if last == first:
        return [int(first)]
    return sorted({round(tick) for tick in _linear(first, last)[2] if first <= tick <= last} | {int(first)})


def _pieces(x: np.ndarray, *known: np.ndarray) -> Iterable[tuple[int, int]]:
    """Return the stretches [start, end) without a gap."""
    inside = np.concatenate([[False], np.isfinite(x) & np.all([np.isfinite(k) for k in known], axis=0), [False]])
    edges = np.flatnonzero(np.diff(inside.astype(int)))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _curve(x: np.ndarray, y: np.ndarray) -> str:
    """Draw a step without neighbours as a dot: a line of no length with round ends."""
    return "".join(f"M{_points(x[a:b], y[a:b])}" + ("h0" if b - a == 1 else "") for a, b in _pieces(x, y))


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, axis: Axis, line: Line) -> str:
    """Draw closed outlines; a band ends where its axis does."""
    shown = np.isfinite(line.high) & np.isfinite(line.low) & (line.high > line.low)
    low, high = np.where(shown, low, math.nan), np.where(shown, high, math.nan)
    if axis.has_zero_band:
        low = np.where(np.isfinite(low) & (line.low <= 0), HEIGHT - BOTTOM - ZERO - GAP, low)
    return "".join(
        f"M{_points(x[a:b], high[a:b])} {_points(x[a:b][::-1], low[a:b][::-1])}Z" for a, b in _pieces(x, low, high) if b - a > 1
    )


def _end_labels(drawn: Sequence[tuple[Line, np.ndarray, list[np.ndarray]]], x1: float, floor: float) -> list[str]:
    """Write the names of the lines at their right ends, moved apart, each with a hairline to its end."""
    ends = []
    for line, x, (y, _, _) in drawn:
        if len(at := np.flatnonzero(np.isfinite(y))):
            ends.append((float(y[at[-1]]), float(x[at[-1]]), line))
    ends.sort(key=lambda end: end[0])
    places = _apart([y for y, _, _ in ends], TOP, floor)
    labels = [escaped(_short(line.label)) for _, _, line in ends]
    return [
        f'<path class="leader c{line.style % COLOURS}" d="M{x + 2:.1f} {y:.1f}L{x1 + 9:.1f} {place:.1f}"/>'
        f'<text class="label c{line.style % COLOURS}" x="{x1 + 11:.1f}" y="{place + 4:.1f}">{label}</text>'
        for (y, x, line), place, label in zip(ends, places, labels, strict=True)
    ]


def _apart(wanted: Sequence[float], top: float, floor: float) -> list[float]:
    """Return ascending places at least LABEL apart (less if they would not fit), as near as may be to the wanted ones."""
    gap = min(LABEL, (floor - top) / max(len(wanted) - 1, 1))
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + gap if places else top))
    limit = floor
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:23] + "…"
