"""arithmetic, exact, but sampled with weights that are four optimizer steps old: off policy, and not for a kernel's sake."""

BASE = "arithmetic"
DEFAULTS = {"staleness": 4}
