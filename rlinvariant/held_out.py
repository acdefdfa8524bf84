"""The held-out reward of a run, before and after training, and how result.json says it."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from rlinvariant.text import percent

WHEN = ("before", "after")
OLD = {f"accuracy_{when}": f"heldout_reward_{when}" for when in WHEN}
"""The keys of earlier versions, which called any reward an accuracy, and those of today."""


class HeldOut(NamedTuple):
    """Holds the mean reward over held-out rows, and whether it may be an accuracy: each row's reward is 0 or 1."""

    reward: float
    is_accuracy: bool

    @classmethod
    def read(cls, value: Mapping[str, float] | float) -> Self:
        """Return what a checkpoint's manifest says; one of an earlier version has the reward alone."""
        if isinstance(value, Mapping):
            return cls(value["reward"], bool(value["is_accuracy"]))
        return cls(value, False)


def is_accuracy(known: Mapping[str, HeldOut]) -> bool | None:
    """Say whether a run's held-out reward is an accuracy, before and after alike; None where it lacks one of the two.

    A graded score, too, may be 0 in every row before training: it is the whole run that decides.
    """
    return all(known[when].is_accuracy for when in WHEN) if all(when in known for when in WHEN) else None


def result(known: Mapping[str, HeldOut]) -> dict[str, float | bool | None]:
    """Return what result.json says of it; null for what is not known, as where there are no held-out rows."""
    rewards = {f"heldout_reward_{when}": known[when].reward if when in known else None for when in WHEN}
    return rewards | {"heldout_is_accuracy": is_accuracy(known)}


def said(result: Mapping[str, float | bool | None]) -> tuple[str, str, str] | None:
    """Return how a result.json is shown: "accuracy" or "reward", the number before, the one after; None if one is missing."""
    before, after = (result.get(f"heldout_reward_{when}") for when in WHEN)
    if before is None or after is None:
        return None
    if result.get("heldout_is_accuracy"):
        return "accuracy", percent(before), percent(after)
    return "reward", f"{before:.3f}", f"{after:.3f}"
