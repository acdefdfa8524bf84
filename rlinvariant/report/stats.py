"""Means and intervals over seeds, and what may be said of two arms.

An interval is mean ± t s / sqrt(n): s the standard deviation over n seeds (n - 1 in its denominator), t the 97.5 % quantile
of Student's t with n - 1 degrees of freedom. Two arms are compared by the differences between runs of the same seed, over the
steps that both runs have, and the verdict is "no difference seen" when the 95 % interval of those differences holds 0; unless
the interval is that wide because one seed went another way than the others, where there is no verdict.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any, Literal

import numpy as np

from rlinvariant.types import JsonRow

LAST = 10  # steps whose reward is averaged
UNDECIDED = "no verdict: the seeds disagree"
ALL_EQUAL = "no verdict: all seeds differ by the same"
NO_COMMON_SEED = "no verdict: no common seed"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Holds a mean over `n` seeds and the ends of its 95 % interval, NaN with fewer than two; and what it is the mean of."""

    mean: float
    low: float
    high: float
    n: int
    values: tuple[float, ...] = ()

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def half(self) -> float:
        """Return half of the interval."""
        return self.mean - self.low

    @property
    def is_wide(self) -> bool:
        """Tell whether half of the interval is more than the mean: the seeds' own values then say more than both."""
        return self.has_interval and self.half > abs(self.mean)


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval. A value that is not finite makes the mean NaN: it is never left out in silence."""
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        return Estimate(math.nan, math.nan, math.nan, n)
    if n > 1 and min(values) == max(values):  # no rounding of a sum may make a width out of equal numbers
        return Estimate(values[0], values[0], values[0], n, tuple(values))
    centre = mean(values)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(centre, centre - half, centre + half, n, tuple(values))


@functools.cache
def t_quantile(degrees: int, coverage: float = 0.95) -> float:
    """Return t with P(|T| <= t) = coverage, where T has Student's distribution with `degrees` degrees of freedom.

    Bisection on the finite series that holds for a whole number of degrees.

    Raises:
        ValueError: fewer than 1 degree of freedom.

    Ref: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"expected at least 1 degree of freedom, got {degrees}")
    low, high = 0.0, 2.0
    while _t_coverage(high, degrees) < coverage:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_coverage(middle, degrees) < coverage else (low, middle)
    return (low + high) / 2


def _t_coverage(t: float, degrees: int) -> float:
    """Return P(|T| <= t)."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    cosine, total = math.cos(angle), 0.0
    term = cosine if odd else 1.0
    for power in range(odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power if power > odd else 1.0
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def curve(values: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `estimate` at every step, over the runs that have the step.

    Args:
        values: [runs, steps] float64. A value that is not finite leaves a gap (NaN) in all three results.
        present: [runs, steps] bool, whether the run has a row of that step.

    Returns:
        (mean, low, high), each [steps]; low and high are NaN where fewer than two runs are present.
    """
    count = present.sum(0)
    finite = (np.isfinite(values) | ~present).all(0) & (count > 0)
    known = np.where(present & finite, values, 0.0)
    centre = np.where(finite, known.sum(0) / np.maximum(count, 1), math.nan)
    least = np.where(present, values, math.inf).min(0)
    equal = finite & (least == np.where(present, values, -math.inf).max(0))
    centre = np.where(equal, least, centre)  # a sum rounds: equal values have themselves as mean, and no width
    squares = np.where(present & finite, (values - centre) ** 2, 0.0).sum(0)
    t = np.array([math.nan, math.nan, *(t_quantile(n - 1) for n in range(2, len(values) + 1))])[count]
    with np.errstate(invalid="ignore"):
        half = t * np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return centre, centre - half, centre + half


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average the finite values among the `window` (odd) around each; NaN where the value itself is not finite.

    Args:
        values: [steps] float64. At both ends the window is cut.
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, window // 2, constant_values=math.nan), window)
    known = np.isfinite(windows)
    count = known.sum(1)
    return np.where(np.isfinite(values), np.where(known, windows, 0.0).sum(1) / np.maximum(count, 1), math.nan)


Summary = Callable[[Sequence[Row], Mapping[str, Any]], float]


@dataclass(frozen=True)
class Measure:
    """Takes one number of a run from its rows and its result.json; NaN where it is not known.

    `style` says how it is printed: "scientific", "percent", "near one" (never rounded to 1), or a number of decimals.
    """

    title: str
    of: Summary
    style: Literal["scientific", "percent", "near one"] | int


def over_steps(key: str, reduce: Callable[[Sequence[float]], float], last: int = 0) -> Summary:
    """Return a measure that reduces one key over all rows or the `last` ones; NaN if there are none, or one lacks the key."""

    def summary(rows: Sequence[Row], result: Mapping[str, Any]) -> float:
        values = [math.nan if row.get(key) is None else float(row[key]) for row in rows[-last:]]
        return reduce(values) if values and all(map(math.isfinite, values)) else math.nan

    return summary


def held_out(rows: Sequence[Row], result: JsonRow) -> float:
    """Return the held-out reward after training; NaN for a run that did not end, or has no held-out data."""
    value = result.get("heldout_reward_after")
    return math.nan if value is None else float(value)


KL = Measure("KL k3, nats", over_steps("onpolicy/kl_k3", mean), "scientific")
ESS = Measure("ESS", over_steps("onpolicy/is_ess", mean), "near one")
REWARD = Measure(f"Reward, last {LAST} steps", over_steps("reward", mean, LAST), 3)
HELD_OUT = Measure("Held-out reward", held_out, 3)
ACCURACY = Measure("Held-out accuracy, %", held_out, "percent")  # in place of it where each reward is 0 or 1
STEP_S = Measure("Seconds per step", over_steps("step_time", median), 3)
MEASURES = (KL, ESS, REWARD, HELD_OUT, ACCURACY, STEP_S)
"""Mean over the steps of a run; of seconds, the median, since the first step starts things up."""


@dataclass(frozen=True)
class Verdict:
    """Says how one measure differs between two arms on the same seeds: arm minus reference."""

    difference: Estimate
    text: str


def verdict(arm: Sequence[float], reference: Sequence[float]) -> Verdict:
    """Compare values of the same seeds, in the same order; pairs in which one is not known are left out, and counted out.

    The text: "no difference seen", "higher", "lower", "one seed: no interval", "not measured", UNDECIDED or ALL_EQUAL. Equal
    differences have no width, however few they are: two seeds that both have one more of 48 right are no evidence.
    """
    pairs = [(a, b) for a, b in zip(arm, reference, strict=True) if math.isfinite(a) and math.isfinite(b)]
    found = estimate([a - b for a, b in pairs])
    if found.n == 0:
        return Verdict(found, "not measured")
    if not found.has_interval:
        return Verdict(found, "one seed: no interval")
    if found.half <= 1e-9 * abs(found.mean) and found.mean:  # but for the rounding of the differences
        return Verdict(found, ALL_EQUAL)
    if not found.low <= 0 <= found.high:
        return Verdict(found, "higher" if found.mean > 0 else "lower")
    seeds_disagree = disagree(found, *(estimate(side) for side in zip(*pairs, strict=True)))
    return Verdict(found, UNDECIDED if seeds_disagree else "no difference seen")


def disagree(difference: Estimate, *arms: Estimate) -> bool:
    """Tell whether the difference of two arms is as uncertain as the wide mean of one of them.

    An interval of 0.4 ± 0.8 holds 0 and everything else, for one seed of three that went another way: it says nothing.
    """
    return any(arm.is_wide and difference.half > abs(arm.mean) for arm in arms)
