"""Faults that are planted in the fork of a run, before its command starts; `server.py` calls them by name."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from trl.trainer.grpo_trainer import GRPOTrainer

from rlinvariant import checkpoints, files, lock
from rlinvariant.trainer.checkpointed import CheckpointedTrainer
from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from tests.reliability.disk import FullDisk
from tests.reliability.events import Events, everywhere


def note_events(under: str, notes: str) -> None:
    """Write down every event of the run, a line each."""
    file = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    Events(Path(under), lambda number, what: os.write(file, f"{what}\n".encode()) and None)


def kill_at(under: str, event: int, torn: bool, in_place: bool = False) -> None:
    """End the run by SIGKILL before an event.

    Args:
        under: the run's directory.
        event: its number.
        torn: half of the file that was opened last is not written yet.
        in_place: a checkpoint that is being written has its name already.
    """

    def react(number: int, what: str) -> None:
        if number != event:
            return
        if torn:
            events.tear()
        for partial in Path(under).glob(f"checkpoints/{checkpoints.PARTIAL}*/checkpoint-*") if in_place else ():
            partial.rename(Path(under, "checkpoints", partial.name))
        os.kill(0, signal.SIGKILL)

    events = Events(Path(under), react)


def full_disk(under: str, free: float = math.inf, writes: float = math.inf) -> None:
    """Let the run write `free` bytes, in so many writes."""
    FullDisk(Path(under), free, writes)


def count_bytes(under: str, notes: str) -> None:
    """Write down, at the end of the run, how many bytes it has written, and in how many writes."""
    disk = FullDisk(Path(under), math.inf, math.inf)
    end = os._exit

    def noted(code: int) -> None:
        Path(notes).write_text(f"{disk.spent} {disk.written}")
        end(code)

    os._exit = noted


def trust_every_checkpoint() -> None:
    """Take the newest directory that is named like a checkpoint, whatever its files hold, as it was before."""

    def newest(directory: Path) -> tuple[checkpoints.Checkpoint | None, list[str]]:
        found = checkpoints.found(directory)
        about = (json.loads((path / checkpoints.MANIFEST).read_text())["about"] for _, path in found)
        return (checkpoints.Checkpoint(found[0][1], found[0][0], next(about)) if found else None), []

    checkpoints.newest = newest


def forget_the_rollout() -> None:
    """Resume without the rollout that is being used, as it was before."""
    InvariantGRPOTrainer._restore_progress = lambda self, progress: None


def forget_the_epoch() -> None:
    """Resume with the order of the data of the first epoch, as it was before."""
    CheckpointedTrainer._init_training_state = GRPOTrainer._init_training_state


def let_the_disks_error_pass() -> None:
    """Turn no error of a disk into a line, as it was before."""
    everywhere(files.disk_errors, lambda *_: nullcontext())


def compare_no_setting() -> None:
    """Resume with any setting, as it was before."""
    from rlinvariant import resumption

    resumption._compared = lambda config, before: ([], [])


def train_on() -> None:
    """Resume a run that is finished like any other, as it was before."""
    from rlinvariant import run

    def train(planned: run.Plan, trainer: InvariantGRPOTrainer) -> int:
        trainer.train(resume_from_checkpoint=planned.resumption.checkpoint)
        return trainer.state.global_step

    run.train = train


def hold_the_lock(until: str) -> None:
    """Wait, when the run's directory is locked, until a file is there."""
    locked = lock.locked

    @contextmanager
    def held(directory: Path, what: str) -> Iterator[int]:
        with locked(directory, what) as file:
            while not Path(until).exists():
                time.sleep(0.05)
            yield file

    everywhere(locked, held)


def lock_nothing() -> None:
    """Let two runs write one directory, as it was before."""
    everywhere(lock.locked, lambda *_: nullcontext())
