"""The lock of a run's or an ablation's directory: two processes that wrote one directory would destroy each other's work."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlinvariant.errors import UserError
from rlinvariant.files import unwritable

NAME = "lock"
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""The errors of `flock` on a file system that has no locks, as some mounts of NFS and Lustre."""


@contextmanager
def locked(directory: Path, what: str) -> Iterator[int]:
    """Hold a directory's only lock while a block runs, and yield its descriptor. The directory is made if it is not there.

    The lock is `flock` of the file `lock`, which names host and process. The kernel drops it with the last process that has the
    descriptor: one that was killed leaves none, and a child that inherits the descriptor holds it while it lives. On a file
    system without locks the file's existence is the lock; what a dead process of this host has left is no obstacle there:
    whoever first makes the file `lock.taking` takes it over.

    Args:
        directory: what nobody else may write.
        what: the setting that names the directory, as the message's first word.

    Raises:
        UserError: somebody else holds it, or it cannot be written.
    """
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _taken(path, what)
        _sign(file)
    except OSError as error:
        raise unwritable(directory, error.strerror, what, "choose another", error.errno) from error
    try:
        yield file
    finally:
        os.close(file)
        _remove(path)


def _taken(path: Path, what: str) -> int:
    """Return the lock's file, open and locked. Raises UserError if somebody else has it."""
    while True:
        made = not path.exists()
        try:
            file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if made else 0), 0o644)
        except (FileExistsError, FileNotFoundError):  # somebody was faster
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path, what, _holder(file)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            if not made:
                _take_over(file, path, what)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # its holder has just removed it


def _take_over(file: int, path: Path, what: str) -> None:
    """Make this process the holder where flock is missing and the holder is dead, one process at a time.

    Raises:
        UserError: the holder may live, or somebody else takes its place.
    """
    if not _is_dead(_holder(file)):
        raise _held(path, what, _holder(file), f"; if it is not, remove {path}")
    taking = path.with_name(f"{NAME}.taking")
    try:
        os.close(os.open(taking, os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        raise _held(path, what, [], f"; if it is not, remove {taking}") from None
    try:
        if not _is_dead(_holder(file)):  # somebody was faster
            raise _held(path, what, _holder(file), f"; if it is not, remove {path}")
        _sign(file)
    finally:
        taking.unlink()


def _sign(file: int) -> None:
    """Write who holds the lock."""
    os.ftruncate(file, 0)
    os.pwrite(file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)


def _remove(path: Path) -> None:
    """Remove the lock's file, unless somebody holds it: a child that inherited it, or who was there first since."""
    with suppress(OSError):
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()  # whoever has opened it by now will see that it is gone
        except OSError as error:
            if error.errno in NO_FLOCK:
                path.unlink()
        finally:
            os.close(file)


def _holder(file: int) -> list[str]:
    """Return host and process as a lock's file names them; nothing if its holder has not written them yet."""
    return os.pread(file, 200, 0).decode(errors="replace").split()


def _is_dead(holder: list[str]) -> bool:
    """Say whether the holder was a process of this host that is gone."""
    if len(holder) != 2 or holder[0] != socket.gethostname() or not holder[1].isdigit():
        return False
    try:
        os.kill(int(holder[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _held(path: Path, what: str, holder: list[str], fix: str = "") -> UserError:
    host, process = holder if len(holder) == 2 else ("an unknown host", "?")
    who = f"process {process} on {host}, or one that it started"
    return UserError(f"{what}: {who}, is at work in {path.parent}; wait for it, or stop it{fix}")
