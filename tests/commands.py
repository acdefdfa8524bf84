"""Run a command as `rlinvariant` does, in this process, with its errors raised."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from rlinvariant import cli


@contextmanager
def interruptible() -> Iterator[None]:
    """Let ctrl-C and a terminal's end reach this process and those it starts, also where a shell has it in its background.

    Such a shell ignores SIGINT, nohup ignores SIGHUP, and every process inherits that.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: str, *arguments: str) -> int:
    """Return the exit code; raises UserError and ParityError.

    A `train` that gets as far as its process fails: with one process that would take pytest's place, and pytest would end
    with its exit code, the rest untested.
    """
    with mock.patch("os.execve", side_effect=AssertionError("train becomes its process, and pytest ends: use tests.forks.run")):
        return cli._dispatch([command, *arguments], "") or 0
