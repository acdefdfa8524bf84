"""The ways in which a command can end: the errors that a user meets, and the table of exit codes."""

import signal
import traceback
from collections.abc import Sequence

from rlinvariant.text import printable

OK, NOT_EXACT, MISUSED, DISK_FULL, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 74, 130, 141
EXIT_CODES = {
    OK: "done, and exact where the command looks",
    NOT_EXACT: "not exact, not shown to be, or not finished; a crash too, with its traceback",
    MISUSED: "refused: something in the command, the machine or the model has to change; one line says what",
    DISK_FULL: "the disk is full, or cannot be written; what was on it before is whole",
    129: "stopped by SIGHUP, as 143",
    INTERRUPTED: "stopped by ctrl-C, at once",
    137: "killed, also by its own deadline: SIGTERM had not ended it in 28 s; the newest checkpoint is what is left",
    138: "stopped by SIGUSR1, as 143",
    PIPE_CLOSED: "the reader of the output went away, as `head` does",
    143: "stopped by SIGTERM: train has finished and saved its step, or says what it could not",
}
"""Exit code of every command -> its meaning, as `rlinvariant --help` and the documentation show it."""


class UserError(Exception):
    """Tells the user of something that the user can mend; printed without a traceback. Exit code `MISUSED`.

    Args:
        agreed: whether all processes of the run raise it together, so that the main one alone says it.
    """

    exit_code = MISUSED

    def __init__(self, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class ConfigErrors(UserError):
    """Lists every problem found in a configuration or a command line, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)

    def __reduce__(self) -> tuple[type, tuple[list[str]], dict[str, object]]:
        return type(self), (self.errors,), vars(self)  # for the other ranks


class ServersLost(UserError):
    """Tells the user that no server is left to draw from; a trainer saves what it has before it ends."""


class DiskError(UserError):
    """Tells the user that a file could not be written, and where. Exit code `DISK_FULL`."""

    exit_code = DISK_FULL


class ParityError(Exception):
    """Tells that sampler and trainer gave different bits where the contract says the same. Exit code `NOT_EXACT`.

    Args:
        agreed: whether all processes of the run raise it together, so that the main one alone says it.
    """

    def __init__(self, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class Stopped(KeyboardInterrupt):
    """Tells that a signal ends this process: exit code 128 + its number, as shells count.

    Args:
        number: the signal.
        after_step: whether training has ended after a whole step, which is saved.
    """

    def __init__(self, number: int, after_step: bool = False) -> None:
        super().__init__()
        self.number, self.after_step = number, after_step


def stop_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that a signal ends."""
    return 128 + error.number if isinstance(error, Stopped) else INTERRUPTED


class PeerFailed(Exception):
    """Tells that another process of the run has failed first.

    Args:
        message: which one, and its error.
        outcome: how that error ends a run.
    """

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.exit_code = MISUSED if outcome == "refused" else NOT_EXACT


def outcome(error: BaseException) -> str:
    """Say in a few words how an error ends a run, as result.json does."""
    if isinstance(error, KeyboardInterrupt):
        code = stop_code(error)
        return "interrupted" if code == INTERRUPTED else f"stopped by {signal.Signals(code - 128).name}"
    if isinstance(error, PeerFailed):
        return error.outcome
    return "not exact" if isinstance(error, ParityError) else "refused" if isinstance(error, UserError) else "failed"


def raised_here(error: BaseException) -> bool:
    """Tell whether an error is of this package's own code, or of Python's or PyTorch's called by it, and not of vLLM's.

    The innermost of the two packages on the way to it decides.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    return [name for name in packages if name in ("rlinvariant", "vllm")][-1:] == ["rlinvariant"]


def one_line(error: object, limit: int = 300) -> str:
    """Return an error's message as one printable line of at most `limit` characters; its type's name where it has none."""
    return printable(" ".join(str(error).split()))[:limit] or type(error).__name__


def located(error: BaseException) -> str:
    """Say in one line what the user's own code raised, and where: type, message, file and line."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {one_line(error.msg)}"
    return f"{type(error).__name__}: {one_line(error)} ({at.filename}, line {at.lineno})"
