"""The page of pairs names tests that are there, and refusals that the code gives."""

import re
from itertools import combinations
from pathlib import Path

import pytest

from rlinvariant.bench import pairs
from tests.trainer.test_pairs import PAIRS

ROOT = Path(__file__).parents[2]


def test_every_test_is_there():
    assert pairs.TESTED.keys() | pairs.refused().keys() == set(combinations(pairs.SAID, 2)), "each pair is one or the other"
    assert not pairs.TESTED.keys() & pairs.refused().keys()
    for where in set(pairs.TESTED.values()):
        path, _, name = where.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), where


def test_every_pair_that_is_trained_for_the_page_is_on_it():
    names = {"mixture": "mixtures", "window": "windows"}
    trained = {frozenset(names.get(one, one) for one in pair.split(", ")) for pair in PAIRS}
    assert trained == {frozenset(pair) for pair, where in pairs.TESTED.items() if where == pairs.PAIRS}


@pytest.mark.parametrize("pair", pairs.refused())
def test_a_refusal_says_a_setting_and_what_was_expected(pair):
    line = pairs.refused()[pair]
    assert re.match(r"[\w.]+=\S+: ", line) and "\n" not in line and len(line) < 260


def test_the_page_has_a_row_for_every_pair():
    rows = [line for line in pairs.page().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 36 and all("exact on a CPU" in r or "refused: `" in r for r in rows)
