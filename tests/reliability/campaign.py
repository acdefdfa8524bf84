"""Runs that are spoilt and resumed, and compared with a run that was never touched."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from tests.reliability.lab import Fault, Lab, Run
from tests.reliability.rundirs import differences

STEPS = 6
SETTINGS = (f"steps={STEPS}", "trainer.save_steps=2", "trainer.save_total_limit=9")


@dataclass
class Campaign:
    """A run that nothing has touched, and others of its settings that something has.

    Args:
        lab: where runs are started.
        name: of the runs: each is made in the place of the one before it.
        settings: of every run.
        planted: faults of each run that is resumed, as a control has them.
    """

    lab: Lab
    name: str = "run"
    settings: Sequence[str] = SETTINGS
    planted: Sequence[Fault] = ()
    bad: list[str] = field(default_factory=list)
    tried: int = 0

    def __post_init__(self) -> None:
        self.untouched = self.lab.directory / "untouched" / self.name
        if not self.untouched.exists():
            run = self.start()
            assert run.wait() == 0, run.text[-3000:]
            self.untouched.parent.mkdir(exist_ok=True)
            self.run_dir.rename(self.untouched)

    @property
    def run_dir(self) -> Path:
        return self.lab.runs / self.name

    def control(self, *planted: Fault) -> Self:
        """Return a campaign beside the same untouched run, whose resumed runs have faults of their own."""
        return replace(self, planted=planted, bad=[], tried=0)

    def start(self, *more: str, faults: Sequence[Fault] = ()) -> Run:
        """Start a run where nothing is, or with what `more` says."""
        return self.lab.start(*self.settings, *more, run=self.name, faults=faults)

    def clear(self) -> None:
        """Remove the run."""
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def rewind(self, step: int) -> Path:
        """Put the run to where it was when `checkpoint-STEP` was its newest, with logs that go on beyond it."""
        self.clear()
        later = [path.name for path in self.untouched.glob("checkpoints/checkpoint-*") if int(path.name[11:]) > step]
        shutil.copytree(self.untouched, self.run_dir, ignore=shutil.ignore_patterns("result.json", "report.html", *later))
        return self.run_dir

    def resume(self, what: str, *more: str, check: Callable[[str], str] = lambda text: "") -> None:
        """Resume the run by the same command with `resume=true`, and compare it with the untouched one.

        Args:
            what: has happened to it.
            more: settings.
            check: says what is wrong with the resumed run's output.
        """
        run = self.start("resume=true", *more, faults=self.planted)
        code = run.wait()
        if code != 0:
            said = next((line for line in reversed(run.text.splitlines()) if line.strip()), "nothing")
            wrong = [f"exit {code}, {'traceback' if 'Traceback' in run.text else 'one line'}: {said[:200]}"]
        else:
            wrong = differences(self.run_dir, self.untouched)
            wrong += [check(run.text)] if check(run.text) else []
        self.note(what, "; ".join(wrong))

    def note(self, what: str, wrong: str) -> None:
        """Count a trial; `wrong` is "" where it was good."""
        self.tried += 1
        if wrong:
            self.bad.append(f"{what}: {wrong}")

    @property
    def good(self) -> int:
        return self.tried - len(self.bad)

    @property
    def report(self) -> str:
        """The trials that were not good, a line each."""
        return "\n".join([f"{self.good} of {self.tried} good", *self.bad])


def sampled(count: int) -> int:
    """Return how many of `count` trials to make: RELIABILITY_PERCENT of them, for a machine that is shared."""
    return max(1, count * int(os.environ.get("RELIABILITY_PERCENT", "100")) // 100)


def spread(count: int, of: int) -> list[int]:
    """Return `count` of the numbers 0 to `of` - 1, evenly; all, where there are no more."""
    return list(range(of)) if of <= count else [int((i + 0.5) * of / count) for i in range(count)]
