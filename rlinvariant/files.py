"""Files that are whole or not there, and places that are tried before the work whose result goes there."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlinvariant.errors import DiskError, UserError

RUNS = Path("runs")  # in the working directory: where runs, ablations and demos keep their files
ANOTHER_CACHE = "set RLINVARIANT_CACHE to a directory that can be written"
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
"""Error numbers of a disk that is full, over a quota, read-only, limited to smaller files, broken, or gone."""


def cache_dir() -> Path:
    """Return the user's cache, which all working directories share: compiled kernels, certificates, models of wheels."""
    return Path(os.environ.get("RLINVARIANT_CACHE") or Path.home() / ".cache" / "rlinvariant")


def require_writable(path: Path, what: str, fix: str, directory: bool = False) -> None:
    """Raise UserError unless `path` could be written now. Nothing is made or changed.

    Args:
        path: a file that a command will write at its end, or with `directory` the directory that it will fill. Neither it nor
            its parents need exist; the nearest that does must be a directory that can be written.
        what: what the path is for, as the message's first word.
        fix: what the user can do, as the message's end.
    """
    if os.path.isdir(path) and not directory:
        raise unwritable(path, "it is a directory", what, fix)
    if os.path.isfile(path) and directory:
        raise unwritable(path, "it is a file", what, fix)
    at = path.absolute()
    nearest = at if os.path.isdir(at) else next(p for p in at.parents if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise unwritable(path, f"{nearest}: {error.strerror}", what, fix, error.errno) from error


def unwritable(path: object, why: str | None, what: str, fix: str, number: int | None = None) -> UserError:
    """Return the error for a path that cannot be written: a DiskError if `number`, of the system's error, is of DISK_FAULTS."""
    kind = DiskError if number in DISK_FAULTS else UserError
    return kind(f"{what}: {path} cannot be written ({why}); {fix}")


def write_atomically(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Write a file in place of an earlier one, in one move, and flush it and its directory to the disk.

    Text is written as UTF-8; a lone surrogate, which UTF-8 does not have, as its escape.

    Args:
        shared: whether another process may write the same file meanwhile, as no lock forbids: the last one's is kept, whole. A
            kill in the middle leaves a file that no later write replaces.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_first(path: Path, content: str) -> None:
    """Write a file whole, unless there is one already."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(content)
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flush a directory to the disk: which names it has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(where: Path, fix: str) -> Iterator[None]:
    """Turn the error of a disk that cannot be written into one line; any other error passes.

    Args:
        where: the directory that is written, named where the error does not say which file it was.
        fix: what the user can do, as the message's end.

    Raises:
        DiskError: a write failed for one of `DISK_FAULTS`.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (said := re.search(r"os error (\d+)", str(error))):
            number = int(said[1])  # safetensors says the number in its text alone
        if number not in DISK_FAULTS:
            raise
        path = getattr(error, "filename", None) or where
        raise DiskError(f"{path}: cannot be written ({os.strerror(number)}); {fix}") from error
