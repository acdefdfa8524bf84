"""Estimates against what they estimate: by going through every choice, and by drawing many times."""

import itertools
import math
import random
import statistics

import pytest

from rlinvariant.evaluation.estimate import doubling, estimate, pass_at_k


@pytest.mark.parametrize(("drawn", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 1, 7), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_choices_of_k_with_one_that_passes(drawn, passed, k):
    choices = list(itertools.combinations([True] * passed + [False] * (drawn - passed), k))
    assert pass_at_k(drawn, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not():
    """Exact expectation over the binomial number of completions that pass."""
    n, k, p = 8, 4, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth, abs=1e-12)
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert abs(plug_in - truth) > 0.01, "the control"


@pytest.mark.parametrize(("drawn", "passed", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(drawn, passed, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(drawn, passed, k)


def test_the_standard_error_is_that_of_a_mean():
    draw = random.Random(3)
    values = [draw.random() for _ in range(50)]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(50))
    assert found.error != pytest.approx(statistics.pstdev(values) / math.sqrt(50)), "the control: N in place of N - 1"
    assert math.isnan(estimate([1.0]).error)


def test_ks_double_up_to_the_number_of_samples():
    assert doubling(1) == [1] and doubling(8) == [1, 2, 4, 8] and doubling(6) == [1, 2, 4, 6]
