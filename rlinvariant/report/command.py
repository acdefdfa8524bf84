"""`rlinvariant report`: the page and the tables of a run or an ablation, or of several beside each other."""

import argparse
from pathlib import Path

from rlinvariant.arguments import written

DESCRIPTION = """Write the report.html of a run or an ablation from what is on the disk, and print its tables. It can be
repeated at any time, while training goes on too. Of several runs or ablations, one page compares them:
runs/comparison-NAMES.html. Runs that differ in nothing but the seed are seeds of one arm there, and the first is what the
others are compared with."""
EXAMPLE = """rlinvariant report runs/first
rlinvariant report runs/ablation-arithmetic
rlinvariant report first second --out both.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("paths", nargs="+", metavar="RUN", help="directories of runs or ablations, runs/NAME, or names")
    parser.add_argument("--out", type=written, metavar="FILE", help="where the page is written, in place of an earlier file")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path. Raises UserError if no run and no ablation is there."""
    from rlinvariant.report import comparison, html, tables
    from rlinvariant.report.console import Console

    study = comparison.load(comparison.located(options.paths))
    file = html.write_study(study, Path(options.out) if options.out else None)
    console = Console()
    tables.show(study, console)
    console.print(f"report: {file}")
