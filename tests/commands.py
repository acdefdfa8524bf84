"""Run a command as `rlinvariant` does, in this process, with its errors raised."""

from rlinvariant import cli


def run(command: str, *arguments: str) -> int:
    """Return the exit code; raises UserError and ParityError."""
    return cli._dispatch([command, *arguments], "") or 0
