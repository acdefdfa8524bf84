"""Every misbehaviour of a reward function in every configuration: ended or survived, in time. Needs a quiet machine."""

import pytest

from tests.rewards.misbehaviours import LATE, NINE, Found, found

LIMIT_S = 2.0
WITHIN_S = LIMIT_S + 2
CONFIGURATIONS = [(cage, errors) for cage in (0, 1, 2) for errors in ("stop", "zero", "none")]


def faults(one: Found) -> list[str]:
    late = one.seconds is None or one.seconds > WITHIN_S
    return one.faults + ([f"{one.name}, cage={one.cage}, {one.errors}: {one.seconds} s"] if late else [])


def every_fault(name: str) -> list[str]:
    return [fault for cage, errors in CONFIGURATIONS for fault in faults(found(name, cage, errors, LIMIT_S))]


@pytest.mark.reliability
def test_nine_of_nine_misbehaviours_are_ended_or_survived_in_time(record_reliability):
    bad = {name: [fault for c in CONFIGURATIONS for fault in faults(found(name, *c, LIMIT_S))] for name in NINE}
    others = [
        fault for name in ("swallows", "async_busy_in_c") for c in CONFIGURATIONS for fault in faults(found(name, *c, LIMIT_S))
    ]
    hangs = [name for name in NINE if name in LATE and found(name, 0, "stop", 0.0, patience=WITHIN_S).seconds is None]
    control = f"without a watchdog {len(hangs)} of the 4 that never return still run at the limit + 2 s"
    record_reliability("rewards", sum(not found for found in bad.values()), len(NINE), control)
    assert not any(bad.values()) and not others, [*bad.values(), others]
    assert len(hangs) == 4
