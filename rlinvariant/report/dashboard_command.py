"""`rlinvariant dashboard push | sync`: a run or an ablation in W&B and TensorBoard."""

import argparse

DESCRIPTION = """Show a run or an ablation elsewhere; both actions can be repeated. push: the panels of the HTML page as a W&B
workspace and report, as JSON files without a login. sync: replay metrics.jsonl into a W&B run and TensorBoard event files."""
EXAMPLE = """rlinvariant dashboard push runs/ablation-arithmetic
rlinvariant dashboard sync runs/first"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("push", "sync"), help="the panels, or the numbers")
    parser.add_argument("path", metavar="RUN_OR_ABLATION", help="directory of a run or of an ablation, runs/NAME")


def run(options: argparse.Namespace) -> None:
    """Print a line for each thing done. Raises UserError as `dashboard.push` and `dashboard.sync` do."""
    from rlinvariant.report import dashboard
    from rlinvariant.text import say

    action = {"push": dashboard.push, "sync": dashboard.sync}[options.action]
    for line in action(options.path):
        say(line)
