"""Memory by which weights go from one process to another of the same host, in place of a connection.

It is a file of Linux that has no name (memfd). Processes of the same user open it by the process that made it and its number
there; nobody else can. It is gone with the last process that has it open, however that one ends.
"""

import io
import os
from collections.abc import Sequence

from rlinvariant.types import Json

NAME = "rlinvariant"  # by which the system shows such files
AT_ONCE = 1024  # buffers that one system call takes


def made(mark: str = "") -> io.FileIO:
    """Return new memory that holds a mark."""
    file = io.FileIO(os.memfd_create(NAME), "r+")
    file.write(mark.encode())
    return file


def path_of(file: io.FileIO) -> str:
    """Return the path by which another process of this host and user opens the memory, as long as this one has it open."""
    return _path(*place_of(file))


def place_of(file: io.FileIO) -> tuple[int, int]:
    """Return the memory's place: the number of this process, and of the file in it."""
    return os.getpid(), file.fileno()


def opened(place: Json, mark: str) -> io.FileIO | None:
    """Open the memory at a place that another process has named.

    Args:
        place: what `place_of` returned there.
        mark: what this process has asked the other to write into it. It is random: whatever else is at that place, on another
            host or of another process, does not hold it.

    Returns:
        None if the memory is not to be had here: it is another host's or another user's.
    """
    try:
        path = _path(*map(int, place))
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # nor is any other file opened: a pipe would lose what is read
            return None
        file = io.FileIO(path, "r+")
        return file if file.read(len(mark) + 1) == mark.encode() else None
    except (OSError, OverflowError, TypeError, ValueError):
        return None


def write(file: io.FileIO, buffers: Sequence[bytes | memoryview]) -> None:
    """Replace all that the memory holds by the bytes of some buffers."""
    file.truncate(sum(map(len, buffers)))
    at = 0
    left = list(buffers)
    while left:
        done = os.pwritev(file.fileno(), left[:AT_ONCE], at)
        at += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:
            left[0] = memoryview(left[0])[done:]


def _path(process: int, number: int) -> str:
    return f"/proc/{process}/fd/{number}"
