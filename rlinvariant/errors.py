"""What goes wrong for the user, as opposed to what is wrong in the code."""

from collections.abc import Sequence


class UserError(Exception):
    """A message for the user, printed on one line without a traceback."""


class ConfigErrors(UserError):
    """Every conflict found in the configuration, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class ParityError(UserError):
    """Sampler and trainer gave different bits where the contract says the same."""
