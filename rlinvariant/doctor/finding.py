"""A line of the doctor's report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Holds what the doctor found about one thing.

    Args:
        name: what was looked at.
        verdict: "ok", "note" (worth knowing, exact all the same) or "problem".
        text: what was found; for a problem, with the fix.
        invariance_off: whether invariance=off runs in spite of it.
    """

    name: str
    verdict: str
    text: str
    invariance_off: bool = True
