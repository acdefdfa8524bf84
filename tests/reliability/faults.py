"""Faults that are planted in the fork of a run, before its command starts; `server.py` calls them by name."""

import math
import os
import signal
from pathlib import Path

from tests.reliability.disk import FullDisk
from tests.reliability.events import Events


def note_events(under: str, notes: str) -> None:
    """Write down every event of the run, a line each."""
    file = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    Events(Path(under), lambda number, what: os.write(file, f"{what}\n".encode()) and None)


def kill_at(under: str, event: int, torn: bool) -> None:
    """End the run by SIGKILL before an event; `torn`: half of the file that was opened last is not written yet."""

    def react(number: int, what: str) -> None:
        if number != event:
            return
        if torn and events.last_opened is not None and events.last_opened.is_file():
            os.truncate(events.last_opened, events.last_opened.stat().st_size // 2)
        os.kill(0, signal.SIGKILL)

    events = Events(Path(under), react)


def full_disk(under: str, free: int) -> None:
    """Let the run write `free` bytes."""
    FullDisk(Path(under), free)


def count_bytes(under: str, notes: str) -> None:
    """Write down, at the end of the run, how many bytes it has written."""
    disk = FullDisk(Path(under), math.inf)
    end = os._exit

    def noted(code: int) -> None:
        Path(notes).write_text(str(disk.spent))
        end(code)

    os._exit = noted
