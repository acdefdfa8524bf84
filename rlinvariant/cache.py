"""Models that are made once and then kept: whole, or not there."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rlinvariant.files import RUNS, disk_errors, unwritable
from rlinvariant.launch import rank

CACHE = RUNS / ".cache"  # in the working directory: the small models that a recipe or a demo makes
ANOTHER_PLACE = "free space, or start in another directory"
"""The advice to a user whose disk cannot hold what goes into `CACHE`."""


def made_once(directory: Path, make: Callable[[Path], object], fix: str = ANOTHER_PLACE) -> str:
    """Return the path of `directory`, which `make` fills unless it is there. It appears whole or not at all.

    Of the ranks of a launch the first makes it and the others wait (transformers saves on rank 0 alone); of separate processes
    that ask at once, one makes it and the others wait on a lock. What an interrupted one has left is removed.

    Args:
        make: fills the directory that it is given.
        fix: what the user can do where the disk cannot be written, as the message's end.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    from filelock import FileLock

    while rank() != 0 and not directory.is_dir():
        time.sleep(0.2)  # if rank 0 fails, the launcher ends this process too
    if directory.is_dir():
        return str(directory)
    lock = FileLock(f"{directory}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise unwritable(directory, error.strerror, "model", fix, error.errno) from error
    try:
        with disk_errors(directory, fix):
            if not directory.is_dir():
                partial = Path(f"{directory}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                os.rename(partial, directory)
    finally:
        lock.release()
    return str(directory)
