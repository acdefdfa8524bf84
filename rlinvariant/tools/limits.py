"""The limits that a run sets its tools and environments, and what the run does where one fails."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from rlinvariant.rewards.limits import Limits

OnToolError: TypeAlias = Literal["tell", "end", "stop"]


@dataclass(frozen=True)
class ToolLimits(Limits):
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

    KIND, CAGE, NO_CAGE = "tool", "true", "false"

    def problems(self) -> list[str]:
        """List what is wrong with the settings, one line each."""
        found = super().problems()
        if self.tool_errors not in ("tell", "end", "stop"):
            found.append(f"tool_errors={self.tool_errors}: expected one of tell, end, stop")
        return found

    def __str__(self) -> str:
        limit = f"at most {self.tool_timeout:g} s a call" if self.tool_timeout else "no time limit"
        effect = {"tell": "is told to the model", "end": "ends that sample", "stop": "ends the run"}[self.tool_errors]
        here = "the trainer's process"
        where = f"a process of its own for each tool, {here} for environments" if self.tool_cage else here
        return f"tools: {limit} (tool_timeout); {where} (tool_cage); a failure {effect} (tool_errors)"


@dataclass(frozen=True)
class EnvironmentLimits(ToolLimits):
    """Holds the same for environments, which no cage can end: their state is in the trainer's process."""

    def overdue(self, where: str) -> str:
        """Return the line about a call that has passed the limit."""
        return f"{where}: no answer within {self.timeout:g} s; raise {self.KIND}_timeout= (0: no limit), or mend it"

    def gone(self, where: str) -> str:
        """Return the line about a call in which the trainer itself has ended."""
        why = "the trainer ended while this ran, in its process: it exited, crashed or was killed"
        return f"{where}: {why}; mend it, or let the environment keep that part in a process of its own"
