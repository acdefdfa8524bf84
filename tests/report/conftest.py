"""An ablation with its report, which several tests read."""

import json
from pathlib import Path

import pytest

from rlinvariant.report import html
from tests.report.pages import HOSTILE
from tests.report.runs import write_ablation


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    """Two arms, three seeds; the sample of one is hostile."""
    path = write_ablation(tmp_path_factory.mktemp("runs") / "ablation-a")
    sample = {"step": 20, "prompt": HOSTILE, "completion": HOSTILE + "x" * 2**20, "reward": 1.0}
    with (path / "drift" / "seed-0" / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    html.write(path)
    return path
