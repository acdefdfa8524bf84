"""An ablation with its report, which several tests read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinvariant.report import completions, html
from tests.report.browser import Browser, browser
from tests.report.pages import HOSTILE
from tests.report.runs import write_ablation
from tests.report.said import said


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    """Two arms, three seeds; the sample of one is hostile."""
    path = write_ablation(tmp_path_factory.mktemp("runs") / "ablation-a")
    completions.write(path / "drift" / "seed-0", said(20, prompt=HOSTILE, completion=HOSTILE + "x" * 2**20))
    html.write(path)
    return path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of a process."""
    with browser() as driver:
        yield driver
