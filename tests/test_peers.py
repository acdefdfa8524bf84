"""Several processes of one run: an error that one leaves is the others' too, and a result without one is nobody's."""

import json
from pathlib import Path

import pytest

from rlinvariant import peers
from rlinvariant.errors import PeerFailed, UserError

FINISHED = {"finished": True, "outcome": "finished", "error": None}


def leave(result: Path, content: dict[str, object]) -> None:
    result.write_text(json.dumps(content))


def test_a_process_that_comes_last_does_not_fail_by_the_result_of_a_finished_run(tmp_path):
    """The main process writes its result as soon as it has left the last barrier, which the others may leave later."""
    result = tmp_path / "result.json"
    with peers.first_failure(result, 1):
        leave(result, FINISHED)


def test_a_process_that_comes_last_fails_by_the_error_of_another(tmp_path):
    """Control."""
    result = tmp_path / "result.json"
    with pytest.raises(PeerFailed, match="^rank 2: out of luck$"), peers.first_failure(result, 1):
        leave(result, peers.failed("rank 2: out of luck"))


def test_the_first_error_is_left_for_the_others_and_is_not_overwritten(tmp_path):
    result = tmp_path / "result.json"
    for rank, error in ((1, "first"), (2, "second")):
        with pytest.raises((UserError, PeerFailed), match="first"), peers.first_failure(result, rank):
            raise UserError(error)
    assert json.loads(result.read_text())["error"] == "rank 1: first"
