"""Reward functions that never return, exit, crash or raise: ended or survived, as configured. All: make reliability."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rewards.misbehaviours import LATE, Found, found

LIMIT_S = 2.0
CASES = [
    ("sleep", 2, "zero"),
    ("async_sleep", 2, "none"),
    ("busy_in_c", 1, "stop"),
    ("sleep", 0, "stop"),
    ("async_sleep", 0, "stop"),
    ("busy_in_c", 0, "stop"),
    ("exits", 0, "stop"),
    ("exits", 0, "zero"),
    ("raises", 0, "none"),
    ("exits_at_once", 0, "stop"),
    ("exits", 2, "zero"),
    ("exits_at_once", 2, "stop"),
    ("segfault", 2, "none"),
    ("killed", 1, "zero"),
    ("raises", 2, "zero"),
]
HANG = ("busy_in_c", "async_sleep")


def limit_s(name: str, cage: int) -> float:
    """Return the limit of a call: in a cage it is that of the good samples, too, which must be in time on a loaded machine."""
    return 60.0 if name not in LATE else 4 * LIMIT_S if cage else LIMIT_S


@pytest.fixture(scope="module")
def all_found() -> dict[tuple[str, int, str] | str, Found]:
    """The cases and, by their names, those without a watchdog, a few at a time: most of them sleep."""
    with ThreadPoolExecutor(8) as pool:
        hang = {name: pool.submit(found, name, 0, "stop", 0.0, patience=LIMIT_S + 2) for name in HANG}
        cases = {case: pool.submit(found, *case, limit_s(*case[:2])) for case in CASES}
        return {key: done.result() for key, done in (hang | cases).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_misbehaviour_is_ended_or_survived_as_configured(case, all_found):
    assert not all_found[case].faults


@pytest.mark.parametrize("name", HANG)
def test_without_a_watchdog_it_hangs(name, all_found):
    """Control: it still runs at the limit + 2 s."""
    alone = all_found[name]
    assert alone.seconds is None and alone.faults
