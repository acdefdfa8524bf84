"""The numbers of an evaluation, each a mean over problems with its standard error.

    mean     m  = (1/N) sum_i x_i               x_i: mean reward of problem i over its n completions
    error    se = sqrt( sum_i (x_i - m)^2 / (N (N - 1)) )
    pass@k   x_i = 1 - C(n - c_i, k) / C(n, k)  c_i: completions of problem i that pass

The error is that of problems drawn at random: it has in it that completions are drawn, too. pass@k is unbiased (Chen et al.,
2021, arXiv:2107.03374): the expected value of "one of k passes", from n >= k completions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """Holds a mean over problems and its standard error, which is NaN for a single problem."""

    mean: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of a value for each problem, and the mean's standard error. Raises ValueError without a value."""
    if not values:
        raise ValueError("no problem, no mean")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan)
    return Estimate(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count * (count - 1))))


def pass_at_k(drawn: int, passed: int, k: int) -> float:
    """Return the unbiased estimate that one of k completions passes, where `passed` of `drawn` did.

    Raises:
        ValueError: not 1 <= k <= drawn, or not 0 <= passed <= drawn.
    """
    if not (1 <= k <= drawn and 0 <= passed <= drawn):
        raise ValueError(f"pass@{k} of {passed} passed among {drawn}")
    return 1.0 - math.comb(drawn - passed, k) / math.comb(drawn, k)


def doubling(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`, and `most` itself."""
    return sorted({*(2**i for i in range(most.bit_length())), most})
