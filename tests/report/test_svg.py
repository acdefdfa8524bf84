"""Charts: axes that take in every value, labels that do not cover each other."""

import re

import numpy as np
import pytest

from rlinvariant.report import svg

LOG0 = "log and zero"


@pytest.mark.parametrize(("scale", "values", "band"), [(LOG0, [0, 0, 0], 1), (LOG0, [0, 1e-9, 3], 1), ("log", [1, 2, 300], 0)])
def test_axes_take_in_every_mean(scale, values, band):
    steps, mean = np.arange(3), np.array(values, float)
    axis = svg._axis([svg.Line("a", 0, steps, mean, mean, mean, mean)], scale)
    y = axis.place(mean)
    assert axis.has_zero_band == bool(band) and np.isfinite(y).all() and (y >= 0).all() and (y <= svg.HEIGHT - svg.BOTTOM).all()
    assert (np.diff(y)[np.diff(mean) > 0] < 0).all()


@pytest.mark.parametrize("scale", ["linear", "from zero"])
def test_a_wide_band_leaves_the_means_their_room(scale):
    steps, mean = np.arange(9), np.linspace(0.2, 0.6, 9)
    axis = svg._axis([svg.Line("a", 0, steps, mean, mean - 9, mean + 9, mean)], scale)
    assert np.ptp(axis.place(mean)) > 0.2 * (svg.HEIGHT - svg.BOTTOM)


def test_labels_are_moved_apart_and_keep_their_order():
    places = svg._apart([50, 50, 51, 199], 10, 200)
    assert all(b - a >= svg.LABEL for a, b in zip(places, places[1:], strict=False)) and places == sorted(places)
    assert places[-1] <= 200 and max(abs(a - b) for a, b in zip(places[:3], (50, 50, 51), strict=True)) < 2 * svg.LABEL + 1


def test_an_area_of_one_step_is_seen():
    drawn = svg.stack("time", "s", np.array([1]), {"a": np.array([1.0]), "b": np.array([2.0])})
    outlines = re.findall(r'class="layer [^>]* d="M([^"]*)Z"', drawn)
    assert len(outlines) == 2
    for outline in outlines:
        xs = [float(x) for x in re.findall(r"([\d.]+)[ ,][\d.]+", outline)]
        assert max(xs) - min(xs) > 100, outline
