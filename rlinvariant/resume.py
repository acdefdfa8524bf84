"""`rlinvariant resume RUN`: the command that started a run once more, from its newest whole checkpoint."""

import argparse
from pathlib import Path

from rlinvariant import reading
from rlinvariant.arguments import SCRIPT, CommandParser, given_by_user
from rlinvariant.config.check import script_problem
from rlinvariant.errors import UserError
from rlinvariant.files import RUNS
from rlinvariant.masking import MASK

DESCRIPTION = """Goes on with a run that was stopped or killed, from its newest checkpoint whose every byte is as it was
written, with the settings of its config.json, on the machine file that it was launched with. What comes out is what an
uninterrupted run would have given, bit for bit. Settings after RUN take the place of the run's: those that would make another
run of it are refused, unless resume=force is among them. A run that has done all its steps is only evaluated again."""
EXAMPLE = """rlinvariant resume runs/first
rlinvariant resume first machine=cpu2"""


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `resume`."""
    parser.add_argument("run", metavar="RUN", help=f"the run's directory, {RUNS}/NAME, or its name")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that take the place of the run's, and machine="
    )


def run(options: argparse.Namespace) -> int | None:
    """Train on.

    Raises:
        UserError: there is no such run, or its config.json is damaged; and as `train.run` does.
    """
    from rlinvariant import train

    name = run_name(options.run)
    if problem := script_problem(RUNS / name):
        raise UserError(problem)
    options.settings = arguments(RUNS / name, options.settings) + [f"run={name}"]
    options.help = options.help_all = False
    return train.run(options)


def run_name(given: str) -> str:
    """Return a run's name for its name or its directory. Raises UserError if there is none."""
    path = Path(given)
    for candidate in (RUNS / path, path):
        if candidate.is_dir() and candidate.resolve().is_relative_to(RUNS.resolve()):
            return str(candidate.resolve().relative_to(RUNS.resolve()))
    raise UserError(f"{given}: no such run; expected a directory under {RUNS.resolve()}, or its name")


def arguments(directory: Path, given: list[str]) -> list[str]:
    """Return `key=value` arguments for what a run's user has set, with `given` in place of what they set anew.

    Raises:
        UserError: there is no run, its config.json is damaged, or a secret, which no file has, is to be given.
    """
    own, recipe = _settings(directory)
    anew = {setting.partition("=")[0] for setting in given}
    if hidden := [key for key, value in own.items() if MASK in value and key not in anew]:
        raise UserError(f"{hidden[0]}: a secret, which config.json does not have; write {hidden[0]}=... after {directory}")
    settings = ({"recipe": recipe} if recipe else {}) | own | {"resume": "true"}
    settings.pop("run", None)
    if "machine" not in anew and (machine := _machine(directory)):
        settings["machine"] = machine
    return [*(f"{key}={value}" for key, value in settings.items() if key not in anew), *given]


def _settings(directory: Path) -> tuple[dict[str, str], str]:
    """Return what a run's user has set on the command line or in a file, and its recipe; "" without, and of a script."""
    from rlinvariant.report.study import argument

    fix = "use the command that started the run, and resume=true"
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory}: holds no run (no config.json); start it by rlinvariant train")
    config = reading.read(path, fix)
    try:
        own = {key: argument(entry["value"]) for key, entry in config.items() if given_by_user(entry["source"])}
        recipe = "" if config["recipe"]["source"] == SCRIPT else str(config["recipe"]["value"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: a setting without value or source; {fix}") from error
    return own, recipe


def _machine(directory: Path) -> str | None:
    """Return the machine file that a run was launched with, if it is known and still there."""
    from rlinvariant.launch import is_launched, machines

    try:
        machine = reading.read(directory / "environment.json").get("machine_file")
    except UserError:
        return None
    known = isinstance(machine, str) and (machine in machines() or Path(machine).is_file())
    return machine if known and not is_launched() else None
