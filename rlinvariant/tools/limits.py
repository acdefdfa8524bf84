"""The limits that a run sets its tools and environments, and what the run does where one fails."""

import math
from dataclasses import dataclass, fields
from typing import Literal, Self, TypeAlias

from rlinvariant.types import JsonObject

OnToolError: TypeAlias = Literal["tell", "end", "stop"]


@dataclass(frozen=True)
class ToolLimits:
    """Holds the settings of tools, under the names that configuration and trainers have for them.

    Args:
        tool_timeout: seconds that one call may take; 0: no limit.
        tool_cage: whether each tool runs in a process of its own; False: in the trainer's. Environments, which keep a state,
            always run in the trainer's.
        tool_errors: what a failure leads to: "tell" gives the model a line about it, "end" ends that sample, "stop" the run.
    """

    tool_timeout: float = 60.0
    tool_cage: bool = False
    tool_errors: OnToolError = "tell"

    @classmethod
    def taken(cls, options: JsonObject) -> Self:
        """Take the settings that are among a trainer's further arguments out of these."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})

    @property
    def limit_s(self) -> float | None:
        """Return the limit of a call in seconds, or None."""
        return self.tool_timeout or None

    @property
    def processes(self) -> int:
        """Return how many processes each tool has; 0: none of its own."""
        return int(self.tool_cage)

    @property
    def caged(self) -> str:
        """Return the setting of the cage, for messages."""
        return f"tool_cage={self.tool_cage}"

    @property
    def uncaged(self) -> str:
        """Return the setting that needs no cage."""
        return "tool_cage=false"

    def problems(self) -> list[str]:
        """List what is wrong with the settings, one line each."""
        found = []
        if not 0 <= self.tool_timeout < math.inf:
            found.append(f"tool_timeout={self.tool_timeout}: expected seconds, more than 0; 0: no limit")
        if self.tool_errors not in ("tell", "end", "stop"):
            found.append(f"tool_errors={self.tool_errors}: expected one of tell, end, stop")
        return found

    def __str__(self) -> str:
        limit = f"at most {self.tool_timeout:g} s a call" if self.tool_timeout else "no time limit"
        effect = {"tell": "is told to the model", "end": "ends that sample", "stop": "ends the run"}[self.tool_errors]
        where = "a process of its own for each" if self.tool_cage else "the trainer's process"
        return f"tools: {limit} (tool_timeout); {where} (tool_cage); a failure {effect} (tool_errors)"

    def overdue(self, where: str) -> str:
        """Return the line about a call that has passed the limit."""
        fix = "raise tool_timeout= (0: no limit), or let tool_cage=true end it"
        return f"{where}: no answer within {self.tool_timeout:g} s; {fix}"

    def gone(self, where: str) -> str:
        """Return the line about a call in which the trainer itself has ended."""
        return f"{where}: the trainer ended while this ran: it exited, crashed or was killed; tool_cage=true survives that"
