"""`rlinvariant train`: from `key=value` arguments to a run."""

import argparse
import os
from collections.abc import Sequence

from rlinvariant import stopping
from rlinvariant.arguments import CommandParser, twice
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.launch import end_with_launcher, is_launched, launch, machines, rank, variables
from rlinvariant.text import say

DESCRIPTION = """Train a policy by a recipe, with GRPO or PPO: vLLM samples, TRL and accelerate train, and every sampled token's
log-prob is compared. Arguments are key=value; all mistakes are listed at once, before anything is loaded.

accelerate starts the processes, as a machine file says: machine=cpu, one process on a CPU; cpu2, two; 1gpu, one on a GPU; 2gpu
and 8gpu, one for each GPU; ..._fsdp2, with weights in shards; or machine=FILE, a file of `accelerate config`. Without it the
machine is 1gpu where torch finds a GPU, else cpu. Under an `accelerate launch` of your own its file holds, and machine= is
refused."""
EXAMPLE = """rlinvariant train recipe=arithmetic steps=20
rlinvariant train recipe=gsm8k model=Qwen/Qwen3-0.6B run=first
rlinvariant train model=DIRECTORY data.path=rows.jsonl reward=rewards.py:right
rlinvariant train config=run.yaml steps=50
rlinvariant train recipe=gsm8k --help"""


def add_arguments(parser: CommandParser) -> None:
    settings = f"recipe=NAME or a path to one, config=FILE (YAML), machine={'|'.join(machines())}|FILE, and any field below"
    parser.add_argument("settings", nargs="*", metavar="key=value", help=settings)
    parser.add_argument("-h", "--help", action="store_true", help="show the fields that matter most, with their values")
    parser.add_argument("--help=all", action="store_true", dest="help_all", help="show all fields")
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> int | None:
    """Train, through accelerate unless accelerate or train.py has started this process; or print the fields.

    Raises:
        UserError, ParityError: as `config.parse`, `launch.launch` and `run.run` do.
    """
    machine, settings = split(options.settings)
    if options.help or options.help_all:
        from rlinvariant.config.help import fields_help

        fields = fields_help(settings, options.help_all)
        say(f"{options.parser.format_help()}\n{fields}")
        return None
    from rlinvariant.config import parse, unreachable

    if machine is not None or not (options.script or is_launched()):
        if not is_launched():
            check(settings, machine)
        return launch(settings, machine)
    echo_s = stopping.ECHO_S if end_with_launcher() else 0.0
    config = parse(settings)
    if problems := unreachable(config):
        raise ConfigErrors(problems)
    from rlinvariant.run import run

    with stopping.listening(config.again, echo_s, rank() == 0):
        run(config)
    return None


def check(settings: Sequence[str], machine: str | None) -> None:
    """Refuse mistakes before any process starts. Raises ConfigErrors with all of them."""
    from rlinvariant.config import parse, unreachable

    errors, launched = [], variables(None)
    try:
        launched = variables(machine)
    except UserError as error:
        errors.append(str(error))
    try:
        config = parse(settings, os.environ | launched)
        errors += [] if errors else unreachable(config)
    except ConfigErrors as error:
        errors += error.errors
    if errors:
        raise ConfigErrors(errors)


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take machine= out of the arguments. Raises ConfigErrors if it is there twice."""
    machine = [argument.partition("=")[2] for argument in arguments if argument.startswith("machine=")]
    if len(machine) > 1:
        raise ConfigErrors([twice("machine", *machine[:2])])
    return machine[0] if machine else None, [argument for argument in arguments if not argument.startswith("machine=")]
