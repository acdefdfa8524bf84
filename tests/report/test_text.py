"""Counts and percentages read the same everywhere: one of a thing is singular, and a percent sign stands apart."""

from rlinvariant.text import percent, plural


def test_one_is_singular():
    assert [plural(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]


def test_a_percentage_has_one_form():
    assert percent(0.688) == "68.8 %"
