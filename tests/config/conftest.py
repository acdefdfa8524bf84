"""Each test has a directory of its own, with a recipe in it."""

from pathlib import Path

import pytest

from tests.config.common import RECIPE


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path
