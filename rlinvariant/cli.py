"""The `rlinvariant` command."""

import functools
import os
import sys
from collections.abc import Callable

from rlinvariant.errors import MISUSED, NOT_EXACT, ConfigErrors, ParityError, UserError

USAGE = """usage: rlinvariant train recipe=NAME [key=value ...]   train in this process (accelerate launch train.py for more)
       rlinvariant train --help                       every field, its value and where it comes from
       rlinvariant ablate recipe=NAME seeds=3         the same runs exact, with drift, corrected, stale; a table and a page
       rlinvariant demo [MODEL] [key=value ...]       one prompt 1,000 times among changing traffic, ops off and on
       rlinvariant serve MODEL [vllm options]         vllm serve with the ops on: a request's bytes do not depend on load
       rlinvariant verify MODEL [--tokens N|--short]  is it exact here, on my model: every relation, controls, a certificate
       rlinvariant bisect MODEL [--seed N]            if not: the first sequence, token, layer, op that differs, and why
       rlinvariant replay RUN --step K                draw and score a recorded step again: are the bits the same
       rlinvariant doctor [MODEL] [--json] [--engine] is this machine able, which kernels, what is in the way
       rlinvariant report RUN_OR_ABLATION             write its report.html, print its tables
       rlinvariant dashboard push RUN_OR_ABLATION     the same panels as a W&B workspace and report; as JSON without a login
       rlinvariant dashboard sync RUN_OR_ABLATION     replay metrics.jsonl into W&B and TensorBoard
       rlinvariant --version"""


def _command(run: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """Arguments to exit code, through `_call`. What a command needs is imported when it runs."""

    @functools.wraps(run)
    def command(argv: list[str]) -> int:
        return _call(lambda: run(argv))

    return command


@_command
def train(argv: list[str]) -> None:
    from rlinvariant.config import parse

    config = parse(argv)
    from rlinvariant.run import run

    run(config)


@_command
def ablate(argv: list[str]) -> int:
    from rlinvariant.ablate import ablate

    return ablate(argv)


@_command
def demo(argv: list[str]) -> None:
    from rlinvariant.demo import demo

    demo(argv)


@_command
def serve(argv: list[str]) -> None:
    from rlinvariant.serve import serve

    serve(argv)


@_command
def verify(argv: list[str]) -> int:
    from rlinvariant.verification.command import command

    return command(argv)


@_command
def bisect(argv: list[str]) -> int:
    from rlinvariant.bisect import bisect

    return bisect(argv)


@_command
def replay(argv: list[str]) -> int:
    from rlinvariant.replay import command

    return command(argv)


@_command
def doctor(argv: list[str]) -> int:
    from rlinvariant.doctor import doctor

    return doctor(argv)


@_command
def report(argv: list[str]) -> None:
    from rlinvariant.report import html, tables
    from rlinvariant.report.console import Console

    file, study = html.write(_one_path("report", argv))
    tables.show(study, Console())
    print(f"report: {file}")


@_command
def dashboard(argv: list[str]) -> None:
    verb, *rest = argv or ["", ""]
    if verb not in ("push", "sync"):
        raise UserError(f"dashboard {verb}: expected dashboard push or dashboard sync, and a directory")
    path = _one_path(f"dashboard {verb}", rest)
    from rlinvariant.report import dashboard

    for line in {"push": dashboard.push, "sync": dashboard.sync}[verb](path):
        print(line)


def _one_path(command: str, argv: list[str]) -> str:
    if len(argv) != 1 or argv[0].startswith("-") or "=" in argv[0]:
        raise UserError(f"{command}: expected one directory of a run or an ablation, got {' '.join(argv) or 'none'}")
    return argv[0]


def _call(command: Callable[[], int | None]) -> int:
    """Run a command, and print a user's mistakes, or that it was interrupted, as one line each. Returns the exit code."""
    # libgomp reads it when torch is imported: spinning threads make a run 10 times slower as soon as cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # "is an experimental feature", said of a switch for cuBLASLt
    try:
        return command() or 0
    except UserError as error:
        # Every rank finds the same configuration errors; other errors are one rank's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigErrors):
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return MISUSED
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_EXACT
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return 130


def main() -> int:
    command, *rest = sys.argv[1:] or ["--help"]
    commands = {
        "train": train,
        "ablate": ablate,
        "demo": demo,
        "serve": serve,
        "verify": verify,
        "bisect": bisect,
        "replay": replay,
        "doctor": doctor,
        "report": report,
        "dashboard": dashboard,
    }
    if command in commands:
        return commands[command](rest)
    if command == "--version":
        from rlinvariant import __version__

        print(__version__)
        return 0
    print(USAGE if command in ("--help", "-h") else f"error: unknown command {command}\n{USAGE}")
    return 0 if command in ("--help", "-h") else 2


if __name__ == "__main__":
    sys.exit(main())
