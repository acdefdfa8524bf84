"""`rlinvariant watch`: the page of a run while it trains."""

import argparse

from rlinvariant.arguments import at_least

DESCRIPTION = """Serve the page of runs to this machine alone (127.0.0.1), up to date while they train, with every completion
that was kept; ctrl-C ends it. The address has a key that other users of the machine cannot guess. From elsewhere:
ssh -L PORT:127.0.0.1:PORT MACHINE, with --port PORT here."""
EXAMPLE = """rlinvariant watch runs/first
rlinvariant watch runs/ablation-arithmetic --port 8010
rlinvariant watch first second"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `watch`."""
    parser.add_argument("paths", nargs="+", metavar="RUN", help="directories of runs or ablations, runs/NAME, or names")
    parser.add_argument("--port", type=at_least(0), default=0, metavar="N", help="of 127.0.0.1; by default any that is free")


def run(options: argparse.Namespace) -> None:
    """Serve until ctrl-C. Raises UserError if there is no such run, or the port cannot be had."""
    from rlinvariant.report import comparison, watch
    from rlinvariant.text import say

    paths = comparison.located(options.paths)
    server, address = watch.server(watch.Page(lambda: comparison.load(paths), paths), options.port)
    say(f"live page: {address}  (ctrl-C ends it)")
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
