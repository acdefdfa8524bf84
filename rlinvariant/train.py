"""`rlinvariant train`: from `key=value` arguments to a run."""

import argparse

DESCRIPTION = """Train a policy by a recipe, with GRPO or PPO: vLLM samples, TRL and accelerate train, and every sampled token's
log-prob is compared. Arguments are key=value; all mistakes are listed at once, before anything is loaded."""
EXAMPLE = """rlinvariant train recipe=arithmetic steps=20
rlinvariant train recipe=gsm8k model=Qwen/Qwen3-0.6B trainer.learning_rate=2e-6 run=first
rlinvariant train recipe=gsm8k --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="recipe=NAME or a path, and any field below")
    parser.add_argument("-h", "--help", action="store_true", help="show every field, its value and where it comes from")
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> None:
    """Train, or print the fields. Raises UserError and ParityError as `run.run` does."""
    from rlinvariant.config import parse

    if options.help:
        print(options.parser.format_help(), flush=True)
    config = parse([*options.settings, *(["--help"] if options.help else [])])
    from rlinvariant.run import run

    run(config)
