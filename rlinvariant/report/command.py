"""`rlinvariant report`: the page and the tables of a run or an ablation."""

import argparse

DESCRIPTION = """Write the report.html of a run or an ablation from what is on the disk, and print its tables. It can be
repeated at any time, while training goes on too."""
EXAMPLE = """rlinvariant report runs/first
rlinvariant report runs/ablation-arithmetic"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_OR_ABLATION", help="directory of a run or of an ablation, runs/NAME")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path. Raises UserError if no run and no ablation is there."""
    from rlinvariant.report import html, tables
    from rlinvariant.report.console import Console

    file, study = html.write(options.path)
    console = Console()
    tables.show(study, console)
    console.print(f"report: {file}")
