"""Several processes of one run: when one fails, the others fail by it, and the run's result names the error of the first.

The first process that fails writes result.json, before its connections close; what that breaks in the others comes later, so
that a result that is there already is always the cause.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlinvariant import held_out, reading
from rlinvariant.errors import PeerFailed, Stopped, UserError, one_line, outcome
from rlinvariant.files import write_first
from rlinvariant.types import JsonObject

KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed, which is not imported for this
TEXTS = re.compile(r"gloo.*(closed|reset|refused|timed out)|connection was likely closed", re.I | re.S)  # RuntimeError


def on_all(error: BaseException) -> bool:
    """Say whether all processes end by an error at the same point, so that the main one alone says it."""
    return isinstance(error, Stopped) and error.after_step or bool(getattr(error, "agreed", False))


def is_loss(error: BaseException) -> bool:
    """Say whether an error is what a process sees when another one of its group is gone."""
    return type(error).__name__ in KINDS or (isinstance(error, RuntimeError) and bool(TEXTS.search(str(error))))


def lost(error: BaseException) -> PeerFailed:
    """Return the error for a process that is gone and has not said why."""
    how = "another process of this run has ended without a word, as one does that is killed"
    return PeerFailed(f"{how} ({one_line(error, 120)})", "failed")


@contextmanager
def first_failure(result: Path, rank: int) -> Iterator[None]:
    """Leave the block's error in the run's result, if this process is not the main one and the first to fail.

    Args:
        result: the file; absent when the block begins.
        rank: this process's number; the main process, 0, writes the result itself.

    Raises:
        PeerFailed: another process has failed before, or is gone; in place of what that has caused here.
    """
    try:
        yield
    except BaseException as error:
        if on_all(error):
            raise
        first = _said(result) or (lost(error) if is_loss(error) else error)
        if rank and not isinstance(first, KeyboardInterrupt):
            _say(result, rank, first)
        if first is error:
            raise
        raise first from error
    if failed := _said(result):
        raise failed


def _said(result: Path) -> PeerFailed | None:
    """Return the error that another process has left; None if none has, or if the main process has finished already."""
    try:
        said = reading.read(result)
    except UserError:
        return None
    if said.get("finished") is True:
        return None
    return PeerFailed(str(said.get("error")), str(said.get("outcome")))


def _say(result: Path, rank: int, error: BaseException) -> None:
    """Leave an error for the main process, and for the user if there is none any more."""
    kind = "" if outcome(error) != "failed" else f"{type(error).__name__}: "
    text = one_line(error) if isinstance(error, PeerFailed) else f"rank {rank}: {kind}{one_line(error)}"
    with suppress(OSError):  # on a host with a disk of its own there is no such directory
        write_first(result, json.dumps(failed(text, outcome(error)), indent=2) + "\n")


def failed(text: str | None, outcome: str = "failed") -> JsonObject:
    """Return what result.json says where the main process does not write it."""
    return {"finished": False, "outcome": outcome, "error": text, **held_out.result({}), "seconds": None}
