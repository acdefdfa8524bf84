"""Intervals are Student's, comparisons are paired, and what is not known is not made up."""

import math

import numpy as np
import pytest

from rlinvariant.report.stats import ALL_EQUAL, UNDECIDED, curve, estimate, over_steps, running_mean, t_quantile, verdict


@pytest.mark.parametrize(  # of a printed table, to its digits
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_t_quantiles_are_those_of_the_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = random.standard_normal((4000, 3))
    hits = sum(e.low <= 0 <= e.high for e in map(estimate, samples.tolist()))
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors
    normal = sum(abs(s.mean()) <= 1.96 * s.std(ddof=1) / 3**0.5 for s in samples)
    assert normal / 4000 < 0.85  # control: with a normal distribution's 1.96 it would not


def test_an_estimate():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.high - 2 == pytest.approx(4.302653 / 3**0.5) == 2 - found.low
    assert estimate([0.1] * 3).low == 0.1 == estimate([0.1] * 3).high
    one = estimate([1.0])
    assert one.mean == 1 and not one.has_interval
    assert math.isnan(estimate([1.0, math.nan]).mean) and math.isnan(estimate([1.0, math.inf]).mean)
    assert math.isnan(estimate([]).mean)


def test_a_curve_is_the_estimate_of_every_step_over_the_runs_that_have_it():
    random = np.random.default_rng(1)
    values, present = random.standard_normal((4, 50)), np.ones((4, 50), bool)
    values[1, 7], values[2, 8] = math.nan, math.inf
    present[3, 30:], present[2:, 40:], present[:, 45:] = False, False, False
    mean, low, high = curve(values, present)
    for step in range(50):
        expected = estimate(values[present[:, step], step].tolist())
        got = (mean[step], low[step], high[step])
        assert got == pytest.approx((expected.mean, expected.low, expected.high), nan_ok=True, rel=1e-12), step
    assert np.isnan(mean[[7, 8, 45]]).all() and np.isfinite(mean[44]) and np.isfinite(low[44])


def test_equal_values_have_no_width():
    mean, low, high = curve(np.full((3, 4), 0.1), np.ones((3, 4), bool))
    assert (mean == 0.1).all() and (low == 0.1).all() and (high == 0.1).all()


@pytest.mark.parametrize(
    ("arm", "reference", "text"),
    [
        ([1.0, 2.0, 3.0], [0.9, 2.1, 3.0], "no difference seen"),
        ([0.0, 0.0], [0.0, 0.0], "no difference seen"),
        ([1.1, 2.1, 3.1001], [1.0, 2.0, 3.0], "higher"),  # the runs of an arm differ by far more than the arms do
        ([0.9, 1.9, 2.8999], [1.0, 2.0, 3.0], "lower"),
        ([5.0], [1.0], "one seed: no interval"),
        ([5.0, math.nan], [1.0, 2.0], "one seed: no interval"),
        ([5.0, math.nan], [math.nan, 2.0], "not measured"),
        ([], [], "not measured"),
        ([0.6, 0.6, 0.0], [0.8, 0.8, 0.75], UNDECIDED),  # one seed collapsed
        ([0.6, 0.6, 0.6], [0.8, 0.8, 0.0], UNDECIDED),
        ([20 / 48, 19 / 48], [19 / 48, 18 / 48], ALL_EQUAL),  # one more right of 48, twice: no width, and no evidence
        ([20 / 48, 19 / 48, 17 / 48], [19 / 48, 18 / 48, 16 / 48], ALL_EQUAL),
        ([0.01, -0.01, 0.02], [0.011, -0.011, 0.021], "no difference seen"),  # near 0, and together
    ],
)
def test_a_verdict_is_of_paired_differences(arm, reference, text):
    assert verdict(arm, reference).text == text


def test_a_mean_that_says_less_than_its_seeds_is_wide():
    assert estimate([0.58, 0.56, 0.02]).is_wide and not estimate([0.58, 0.56, 0.52]).is_wide
    assert not estimate([0.0, 0.0]).is_wide and not estimate([1.0]).is_wide
    assert estimate([3.0, 1.0]).values == (3.0, 1.0)


def test_a_paired_verdict_needs_the_right_pairs():
    assert verdict([11.1, 12.1, 13.1001], [13.0, 11.0, 12.0]).text == "no difference seen"


def test_a_running_mean_keeps_what_is_exact_and_where_the_gaps_are():
    assert (running_mean(np.ones(50), 21) == 1).all() and (running_mean(np.zeros(50), 21) == 0).all()
    values = np.arange(10.0)
    values[4] = math.nan
    found = running_mean(values, 3)
    assert math.isnan(found[4]) and found[3] == 2.5 and found[5] == 5.5 and found[0] == 0.5 and found[8] == 8
    assert running_mean(values, 1)[7] == 7


def test_a_measure_of_rows_that_lack_it_is_not_known():
    mean_of = over_steps("x", lambda values: sum(values) / len(values), last=2)
    assert mean_of([{"x": 100}, {"x": 1}, {"x": 3}], {}) == 2
    assert all(math.isnan(mean_of(rows, {})) for rows in ([], [{"y": 1}], [{"x": 1}, {"x": math.nan}], [{"x": None}]))
