"""The limits that a run sets its reward functions, and what the run does where one fails."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self, TypeAlias

from rlinvariant.types import JsonObject

OnError: TypeAlias = Literal["stop", "zero", "none"]


@dataclass(frozen=True)
class Limits:
    """Says what a cage and the watchdog read of the settings of reward functions, or of tools.

    `KIND` begins the names of the settings; `CAGE` and `NO_CAGE` are values of the one for the cage, as a user writes them.
    """

    KIND: ClassVar[str]
    CAGE: ClassVar[str]
    NO_CAGE: ClassVar[str]

    @classmethod
    def taken(cls, options: JsonObject) -> Self:
        """Take the settings that are among a trainer's further arguments out of these."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})

    @property
    def timeout(self) -> float:
        """Return the seconds that one call may take; 0: no limit."""
        return getattr(self, f"{self.KIND}_timeout")

    @property
    def limit_s(self) -> float | None:
        """Return the limit of a call in seconds, or None."""
        return self.timeout or None

    @property
    def processes(self) -> int:
        """Return how many processes each function has; 0: none of its own."""
        return int(getattr(self, f"{self.KIND}_cage"))

    @property
    def caged(self) -> str:
        """Return the setting of the cage, for messages."""
        return f"{self.KIND}_cage={getattr(self, f'{self.KIND}_cage')}"

    @property
    def uncaged(self) -> str:
        """Return the setting that needs no cage."""
        return f"{self.KIND}_cage={self.NO_CAGE}"

    def problems(self) -> list[str]:
        """List what is wrong with the settings, one line each."""
        if 0 <= self.timeout < math.inf:
            return []
        return [f"{self.KIND}_timeout={self.timeout}: expected seconds, more than 0; 0: no limit"]

    def overdue(self, where: str) -> str:
        """Return the line about a call that has passed the limit."""
        fix = f"raise {self.KIND}_timeout= (0: no limit), or let {self.KIND}_cage={self.CAGE} end it"
        return f"{where}: no answer within {self.timeout:g} s; {fix}"

    def gone(self, where: str) -> str:
        """Return the line about a call in which the trainer itself has ended."""
        why = "the trainer ended while this ran: it exited, crashed or was killed"
        return f"{where}: {why}; {self.KIND}_cage={self.CAGE} survives that"


@dataclass(frozen=True)
class RewardLimits(Limits):
    """Holds the settings of reward functions, under the names that configuration and trainers have for them.

    Args:
        reward_timeout: seconds that one call may take; 0: no limit.
        reward_cage: processes that each function runs in, each with its share of a batch; 0: the trainer's own process.
        reward_errors: what a sample gets that a function fails on: "stop" ends the run, "zero" is 0.0, "none" is None.
    """

    reward_timeout: float = 600.0
    reward_cage: int = 0
    reward_errors: OnError = "stop"

    KIND, CAGE, NO_CAGE = "reward", "1", "0"

    def problems(self) -> list[str]:
        """List what is wrong with the settings, one line each."""
        found = super().problems()
        if not 0 <= self.reward_cage <= 256:
            found.append(f"reward_cage={self.reward_cage}: expected 0 to 256 processes")
        if self.reward_errors not in ("stop", "zero", "none"):
            found.append(f"reward_errors={self.reward_errors}: expected one of stop, zero, none")
        return found

    def __str__(self) -> str:
        limit = f"at most {self.reward_timeout:g} s a call" if self.reward_timeout else "no time limit"
        cage = f"{self.reward_cage} of their own for each" if self.reward_cage else "the trainer's"
        effect = {"stop": "ends the run", "zero": "is a reward of 0", "none": "leaves the sample out"}[self.reward_errors]
        processes = f"reward_cage={self.reward_cage}, processes: {cage}"
        return f"reward functions: {limit} (reward_timeout); {processes}; a failure {effect} (reward_errors)"
