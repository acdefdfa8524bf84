"""The `rlinvariant` command."""

import os
import sys

from rlinvariant.errors import ConfigErrors, UserError

USAGE = """usage: rlinvariant train recipe=NAME [key=value ...]   train in this process (accelerate launch train.py for more)
       rlinvariant train --help                       every field, its value and where it comes from
       rlinvariant --version"""


def train(argv: list[str]) -> int:
    """Parse, run, and print a user's mistakes as one line each. Returns the exit code."""
    # libgomp reads it when torch is imported: spinning threads make a run 10 times slower as soon as cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # "is an experimental feature", said of a switch for cuBLASLt
    try:
        from rlinvariant.config import parse

        config = parse(argv)
        from rlinvariant.run import run

        run(config)
    except UserError as error:
        # Every rank finds the same configuration errors; other errors are one rank's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigErrors):
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "train":
        return train(rest)
    if command == "--version":
        from rlinvariant import __version__

        print(__version__)
        return 0
    print(USAGE if command in ("--help", "-h") else f"error: unknown command {command}\n{USAGE}")
    return 0 if command in ("--help", "-h") else 2
