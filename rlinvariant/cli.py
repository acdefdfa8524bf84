"""The `rlinvariant` command: one parser, whose subcommands are the table below.

A command is a module that is light to import, with `DESCRIPTION` and `EXAMPLE`, `add_arguments(parser)`, and `run(options)`,
which returns an exit code of errors.py, or None for 0, and raises UserError or ParityError.
"""

import argparse
import importlib
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import NamedTuple, NoReturn

from rlinvariant import errors, runtime
from rlinvariant.arguments import CommandParser, suggestion, wrapped
from rlinvariant.errors import ConfigErrors, ParityError, PeerFailed, UserError
from rlinvariant.install import require_working_install
from rlinvariant.launch import is_launched, rank
from rlinvariant.peers import is_loss
from rlinvariant.text import say

DESCRIPTION = "Exact on-policy RL: vLLM samples and a Hugging Face model trains, and their log-probs are the same 32 bits."


class Command(NamedTuple):
    """Describes a row of the table: a subcommand, the module that has its arguments and its work, and a line about it."""

    name: str
    module: str
    summary: str


COMMANDS = (
    Command("train", "rlinvariant.train", "train a policy by a recipe, with GRPO or PPO"),
    Command("resume", "rlinvariant.resume", "go on with a run that was stopped, bit for bit"),
    Command("eval", "rlinvariant.evaluation.command", "held-out reward and pass@k of a run or a model, with errors"),
    Command("verify", "rlinvariant.verification.command", "is it exact here, on my model? counts and a certificate"),
    Command("bisect", "rlinvariant.bisect.command", "where sampler and trainer differ first, and why"),
    Command("doctor", "rlinvariant.doctor.command", "is this machine able, and what is in the way"),
    Command("replay", "rlinvariant.replay", "draw and score a recorded step again, bit for bit"),
    Command("ablate", "rlinvariant.ablate.command", "compare exact, drift, corrections, staleness over seeds"),
    Command("merge", "rlinvariant.merge", "an adapter merged into its base, and how much that loses"),
    Command("demo", "rlinvariant.demo.command", "one prompt 1,000 times in changing traffic, ops off and on"),
    Command("serve", "rlinvariant.serve", "vLLM's server with the ops on: load changes no byte"),
    Command("ls", "rlinvariant.report.ls_command", "the runs that are there: steps, reward, mismatched, when"),
    Command("report", "rlinvariant.report.command", "page and tables of a run or an ablation, or of several"),
    Command("watch", "rlinvariant.report.watch_command", "the same page live while they train, on this machine alone"),
    Command("samples", "rlinvariant.report.samples_command", "search and sort what a run has said"),
    Command("dashboard", "rlinvariant.report.dashboard_command", "the same in W&B and TensorBoard; as JSON without a login"),
)
LOOKING_COMMANDS = (
    "doctor",
    "ls",
    "report",
    "watch",
    "samples",
    "dashboard",
)  # which run, and say more, where packages break each other
EXAMPLES_OF = ("train", "eval", "verify", "report")  # whose examples `rlinvariant --help` shows


def build_parser(chosen: str, module: ModuleType | None, script: str = "") -> argparse.ArgumentParser:
    """Build the parser of all commands. Only the chosen one gets its arguments, so that no other module is imported.

    Args:
        chosen: the command that is to be parsed, or "".
        module: the chosen command's module.
        script: file that starts this command alone; it then stands for `rlinvariant COMMAND` in help and errors.
    """
    from rlinvariant import __version__

    parser = CommandParser(prog="rlinvariant", description=wrapped(DESCRIPTION))
    parser.add_argument("-V", "--version", action="version", version=__version__, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, _, summary in COMMANDS:
        command = commands.add_parser(name, help=summary, prog=script or None)
        command.set_defaults(script=script)
        if name == chosen and module is not None:
            command.description, command.epilog = wrapped(module.DESCRIPTION), _examples(module.EXAMPLE)
            module.add_arguments(command)
    if not chosen:
        modules = [importlib.import_module(command.module) for command in COMMANDS if command.name in EXAMPLES_OF]
        examples = _examples("\n".join(module.EXAMPLE.splitlines()[0] for module in modules))
        codes = "\n".join(wrapped(f"{code}: {meaning}", "  ", "    ") for code, meaning in errors.EXIT_CODES.items())
        parser.epilog = f"{examples}\n\nexit codes:\n{codes}\n\n`rlinvariant COMMAND --help` says more of each."
    return parser


def _examples(text: str) -> str:
    """Put command lines, one a line, under a title."""
    lines = text.strip().splitlines()
    return "\n".join([f"example{'s' if len(lines) > 1 else ''}:", *(f"  {line.strip()}" for line in lines)])


def main(arguments: Sequence[str] | None = None, script: str = "") -> int:
    """Run a command line, of this process if none is given, and return its exit code.

    Args:
        arguments: command and its arguments.
        script: as for `build_parser`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _dispatch(given, script))


def _dispatch(arguments: list[str], script: str) -> int | None:
    """Find the command, parse its arguments and run it."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    arguments = arguments or ["--help"]
    name = arguments[0]
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        if not name.startswith("-"):
            raise UserError(f"{name}: unknown command{suggestion(name, [c.name for c in COMMANDS])}; see rlinvariant --help")
        build_parser("", None).parse_args(arguments)  # prints a help or the version and exits, or refuses
        raise UserError("COMMAND: missing; see rlinvariant --help")
    module = importlib.import_module(command.module)
    parser = build_parser(name, module, script)
    options, others = parser.parse_known_args(arguments)
    if others and hasattr(options, "settings"):
        options.settings += others  # key=value arguments: what is wrong with these is said with all other mistakes
    elif others:
        raise UserError(f"{name}: unrecognized arguments: {' '.join(others)}; see rlinvariant {name} --help")
    if name not in LOOKING_COMMANDS:
        require_working_install()
    return module.run(options)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. A user's mistake, a broken proof and ctrl-C are printed as a line each."""
    runtime.before_torch()
    sys.excepthook = _crashed
    threading.excepthook = lambda failed: _crashed(failed.exc_type, failed.exc_value, failed.exc_traceback)
    try:
        code = _reported(command)
        sys.stdout.flush()  # a reader that went away is noticed here, not when the interpreter ends
        return code
    except BrokenPipeError:
        if not _reader_is_gone():  # the pipe was another, between processes of this run
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return errors.PIPE_CLOSED


def _reported(command: Callable[[], int | None]) -> int:
    """Run a command; print what ended it early, and return the exit code."""
    main_process = rank() == 0
    try:
        return command() or errors.OK
    except SystemExit as end:  # argparse has printed a help or the version
        if isinstance(end.code, str):  # Python prints it where nothing catches the exit
            say(end.code, error=True)
        return end.code if isinstance(end.code, int) else errors.OK if end.code is None else errors.MISUSED
    except UserError as error:
        # Every rank finds the same configuration errors; other errors are one rank's own, unless all have agreed on one.
        _say_once(error, main_process or not (error.agreed or isinstance(error, ConfigErrors)))
        return error.exit_code
    except ParityError as error:
        _say_once(error, main_process or not error.agreed)
        return errors.NOT_EXACT
    except PeerFailed as error:
        if main_process:
            say(f"error: {error}", error=True)
        return error.exit_code
    except KeyboardInterrupt as stop:
        if main_process:
            say(str(stop) or errors.outcome(stop), error=True)
        return errors.stop_code(stop)


def _say_once(error: Exception, here: bool) -> None:
    """Print an error's lines, or wait while the main process of the run prints them, and print them if it does not."""
    of = "" if here else f"rank {rank()}: "
    if not here and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)  # torchrun ends all ranks with the first: this one is ended after rank 0 has said why, if it has
        here = True
    if here:
        for line in str(error).split("\n"):
            say(f"error: {of}{line}", error=True)


def end(arguments: Sequence[str] | None = None, script: str = "") -> NoReturn:
    """Run a command line, and end this process with its exit code. Arguments are those of `main`.

    What vLLM and torch do at a process's end takes seconds. Where a signal ends it, or others of the run wait for what it will
    never send, it ends at once.
    """
    try:
        code = main(arguments, script)
    except Exception as error:
        if rank() == 0 or not is_loss(error):  # else the process that is gone has said why
            sys.excepthook(type(error), error, error.__traceback__)
        code = errors.NOT_EXACT
    if code > 128 or (code and is_launched()):
        os._exit(code)
    sys.exit(code)


def _crashed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Print a traceback as the interpreter does, but for what a terminal would obey: an error's text may be a model's."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)


def _reader_is_gone() -> bool:
    """Say whether nobody reads this process's output any more."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    end()
