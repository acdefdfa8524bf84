"""What a command can end with besides success: a mistake of the user's, and a broken proof."""

from collections.abc import Sequence

OK, NOT_EXACT, MISUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes of every command: done and exact; not exact, or not shown to be; refused; stopped by ctrl-C."""


class UserError(Exception):
    """A message for the user, who can mend its cause; printed without a traceback. Exit code `MISUSED`."""


class ConfigErrors(UserError):
    """Every conflict found in the configuration, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class ParityError(Exception):
    """Sampler and trainer gave different bits where the contract says the same. Exit code `NOT_EXACT`."""


def one_line(error: object, limit: int = 300) -> str:
    """Return an error's message as one line of at most `limit` characters; its type's name where it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
