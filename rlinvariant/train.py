"""`rlinvariant train`: from `key=value` arguments to a run."""

import argparse

from rlinvariant.launch import is_launched, launch, machines

DESCRIPTION = """Train a policy by a recipe, with GRPO or PPO: vLLM samples, TRL and accelerate train, and every sampled token's
log-prob is compared. accelerate starts the processes, as the machine file says. Arguments are key=value; all mistakes are
listed at once, before anything is loaded."""
EXAMPLE = """rlinvariant train recipe=arithmetic steps=20
rlinvariant train recipe=gsm8k model=Qwen/Qwen3-0.6B trainer.learning_rate=2e-6 run=first
rlinvariant train recipe=gsm8k --help"""
HELP = "recipe=NAME or a path, and any field below"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"{HELP}; machine={'|'.join(machines())}|FILE")
    parser.add_argument("-h", "--help", action="store_true", help="show every field, its value and where it comes from")
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> int | None:
    """Train, through accelerate unless accelerate has started this process, or print the fields.

    Raises:
        UserError, ParityError: as `launch.launch` and `run.run` do.
    """
    given = [x.partition("=")[2] for x in options.settings if x.startswith("machine=")]
    settings = [x for x in options.settings if not x.startswith("machine=")]
    if given or not (options.help or options.script or is_launched()):
        return launch(settings, given[-1] if given else None)
    from rlinvariant.config import parse

    if options.help:
        print(options.parser.format_help(), flush=True)
    config = parse([*settings, *(["--help"] if options.help else [])])
    from rlinvariant.run import run

    run(config)
