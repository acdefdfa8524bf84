"""The error that a run ends with when something fails while the run is being left."""

import json

import pytest

from rlinvariant.config import parse
from rlinvariant.errors import ParityError
from rlinvariant.journal import Journal
from rlinvariant.report.console import Console
from rlinvariant.resumption import Resumption


def failing() -> None:
    raise RuntimeError("wandb is down")


@pytest.fixture
def journal(tmp_path, monkeypatch) -> Journal:
    monkeypatch.chdir(tmp_path)
    config = parse(["recipe=arithmetic", "run=x", "wandb.mode=disabled"], {})
    made = Journal(config, "a/model", {}, Console(), True, "", Resumption())
    made.directory.path.mkdir(parents=True)
    made._environment, made._finish_wandb = {}, failing
    return made


def result(journal: Journal) -> dict:
    return json.loads((journal.directory.path / "result.json").read_text())


def test_a_failure_of_the_last_words_does_not_hide_the_error_of_the_run(journal, capsys):
    with pytest.raises(ParityError, match="step 3"), journal.finishing():
        raise ParityError("step 3: mismatched 1 / 10")
    assert (result(journal)["outcome"], result(journal)["error"]) == ("not exact", "step 3: mismatched 1 / 10")
    assert "W&B: not written: wandb is down" in capsys.readouterr().out


def test_a_failure_of_the_last_words_is_the_error_of_a_run_that_has_none(journal):
    with pytest.raises(Exception, match=".+"), journal.finishing():
        pass
    assert result(journal)["outcome"] == "finished"
