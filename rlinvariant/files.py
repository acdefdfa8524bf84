"""Files that are whole or not there, and places that are tried before the work whose result goes there."""

import os
import tempfile
from pathlib import Path

from rlinvariant.errors import UserError

RUNS = Path("runs")  # in the working directory: where runs, ablations and demos keep their files


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
        raise unwritable(path, f"{nearest}: {error.strerror}", what, fix) from error


def unwritable(path: object, why: str | None, what: str, fix: str) -> UserError:
    """Return the error for a path that cannot be written."""
    return UserError(f"{what}: {path} cannot be written ({why}); {fix}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in place of an earlier one, in one move, and flush it and its directory to the disk.

    Text is written as UTF-8; a lone surrogate, which UTF-8 does not have, as its escape.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory to the disk: which names it has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
