"""Rows are divided into parts of few tokens, and TRL counts as few micro-batches as it can."""

import random

import pytest

from rlinvariant.trainer.division import merged, pack_rows


def test_parts_hold_every_row_once_and_at_most_so_many_tokens():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        most, least = rng.randint(1, 300), rng.randint(1, 5)
        parts = pack_rows(lengths, most, least)
        assert sorted(row for part in parts for row in part) == [*range(len(lengths))]
        assert all(sum(lengths[row] for row in part) <= max(most, *lengths) for part in parts)
        assert len(parts) >= min(least, len(lengths))
        assert parts == pack_rows(lengths, most, least)


def test_no_part_is_needlessly_small():
    assert pack_rows([8] * 16, 64) == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert len(pack_rows([10] * 100, 1000)) == 1 and len(pack_rows([10] * 100, 999)) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [((8, 4, 4), (32, 1, 1)), ((8, 4, 8), (32, 1, 2)), ((8, 3, 2), (8, 3, 2)), ((8, 4, 2), (16, 2, 1)), ((8, 1, 1), (8, 1, 1))],
)
def test_trl_counts_as_few_micro_batches_as_the_rollout_allows(given, expected):
    assert merged(*given) == expected
    (rows, steps, rollout), (new_rows, new_steps, new_rollout) = given, expected
    assert rows * steps == new_rows * new_steps and rows * rollout == new_rows * new_rollout
