"""Reward functions that never return, exit, crash or raise: ended or survived, as configured. All: make reliability."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rewards.misbehaviours import Found, found

LIMIT_S = 2.0
CASES = [
    ("sleep", 0, "stop"),
    ("async_sleep", 0, "stop"),
    ("busy_in_c", 0, "stop"),
    ("exits", 0, "stop"),
    ("exits", 0, "zero"),
    ("raises", 0, "none"),
    ("exits_at_once", 0, "stop"),
    ("sleep", 2, "zero"),
    ("async_sleep", 2, "none"),
    ("busy_in_c", 1, "stop"),
    ("exits", 2, "zero"),
    ("exits_at_once", 2, "stop"),
    ("segfault", 2, "none"),
    ("killed", 1, "zero"),
    ("raises", 2, "zero"),
]


@pytest.fixture(scope="module")
def all_found() -> dict[tuple[str, int, str], Found]:
    """The cases, a few at a time: most of them sleep."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(CASES, pool.map(lambda case: found(case[0], case[1], case[2], LIMIT_S), CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_misbehaviour_is_ended_or_survived_as_configured(case, all_found):
    assert not all_found[case].faults


@pytest.mark.parametrize("name", ["busy_in_c", "async_sleep"])
def test_without_a_watchdog_it_hangs(name):
    """Control: it still runs at the limit + 2 s."""
    alone = found(name, 0, "stop", 0.0, patience=LIMIT_S + 2)
    assert alone.seconds is None and alone.faults
