"""The plugin of `make reliability`: gathers what the tests marked `reliability` measured, prints one table, and keeps it.

A test measures a row by `record_reliability(row, good, of, control)`, a fixture of tests/conftest.py. When a test ends, its row
takes the place of the earlier one in rlinvariant/bench/results/cpu/reliability.json, with its commit; `python -m
rlinvariant.bench report docs/results/reliability.md` shows them.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.bench import tables
from rlinvariant.files import write_atomically
from rlinvariant.machine import environment

FILE = Path(__file__).parents[2] / "rlinvariant/bench/results/cpu/reliability.json"
ROWS = {  # row -> (what is done, how many are to be good)
    "kills": ("kill -9 at a file-system event, also before the first checkpoint and before config.json; `resume=true`", 100),
    "kills, timed": ("kill -9 at a time; `resume=true`", 6),
    "kills, of a real start": ("the same run by the documented command and by a fork; kill -9 of it; resumed by it", 3),
    "offsets": ("resume after every step inside a reused rollout, in accumulation, after epochs, with evaluation", 54),
    "offsets, PPO": ("resume after every step, PPO with its critic", 4),
    "offsets, staleness": ("resume after every step, staleness=1", 4),
    "offsets, two processes": ("resume two gloo processes", 1),
    "damages": ("damage to a file of the newest checkpoint: seen before training, fallen back from", 100),
    "damages, one checkpoint": ("the same where there is no other checkpoint: one line", 10),
    "full disks": ("no space at a write: one line, exit 74, old checkpoint whole, resume goes on", 20),
    "other settings": ("resume with another setting that decides the result: refused or said", 11),
    "two at once": ("two resumes of one run at once: one goes on, the other is refused in one line", 1),
    "finished": ("resume of a finished run: evaluates, trains nothing", 1),
    "soak": ("steps with memory, descriptors and threads constant", 2000),
    "command lines": ("fuzzed command lines without a traceback", 2000),
    "data sets": ("malformed data sets: taken, or refused by lines that name row or column", 500),
    "NaN": ("NaN or infinity planted: stopped before the optimizer step, no checkpoint holds it", 50),
    "rewards": ("misbehaving rewards: ended or survived, as configured, within the limit + 2 s", 9),
}


class Table:
    """Holds the rows, and writes each as soon as it is measured: a session that is ended loses none.

    Args:
        file: where they are.
    """

    def __init__(self, file: Path = FILE) -> None:
        self.file, self.machine, self.measured = file, environment(), False
        self.commit = (self.machine["git"] or {}).get("commit", "unknown")[:9]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what a test has measured, also where it then failed; under xdist this is called where reports arrive."""
        if report.when == "call":
            for name, found in report.user_properties:
                if name == "reliability" and isinstance(found, dict):
                    self.write({**found, "passed": report.passed, "seconds": round(report.duration)})

    def write(self, found: dict[str, Any]) -> None:
        """Put a row in the place of an earlier one."""
        rows = {row["row"]: row for row in json.loads(self.file.read_text())["rows"]} if self.file.exists() else {}
        what, target = ROWS[found["row"]]
        rows[found["row"]] = {"what": what, "target": target, "commit": self.commit, "date": str(date.today()), **found}
        self.content = {"environment": self.machine, "rows": [rows[name] for name in ROWS if name in rows]}
        write_atomically(self.file, json.dumps(self.content, indent=1) + "\n")
        self.measured = True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.measured:
            terminalreporter.section("reliability")
            terminalreporter.write_line(tables.reliability(self.content))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the table in the process to which all reports come, and not in xdist's workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table())
