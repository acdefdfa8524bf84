"""A disk that becomes full: below a directory, a run can write so many bytes and no more."""

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

from tests.reliability.events import everywhere

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


class FullDisk:
    """Lets a process write so much below `under`; what is beyond fails as the kernel makes it fail, to the process's end.

    Python's files keep the part of a write that still fits, as a file system does. Files that safetensors writes, from Rust,
    are cut and raise its error. `spent` and `written` count.

    Args:
        under: the directory.
        free: bytes that fit.
        writes: how many writes fit, whatever their bytes: most are small.
    """

    def __init__(self, under: Path, free: float, writes: float) -> None:
        self.under, self.free, self.writes, self.spent, self.written = f"{under}/", free, writes, 0, 0
        self._open = builtins.open
        builtins.open = io.open = self._limited_open
        from safetensors import SafetensorError
        from safetensors import torch as tensors

        save = tensors.save_file

        def save_file(found: Any, filename: Any, *arguments: Any, **others: Any) -> None:
            save(found, filename, *arguments, **others)
            if self.is_here(filename) and (left := self.take(size := os.path.getsize(filename))) < size:
                os.truncate(filename, left)
                raise SafetensorError(FULL)

        everywhere(save, save_file)

    def is_here(self, path: Any) -> bool:
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(self.under)

    def take(self, count: int) -> int:
        """Return how many of `count` bytes still fit, and use them up."""
        self.written += 1
        fit = int(min(count, self.free - self.spent)) if self.written <= self.writes else 0
        self.spent += fit
        if fit < count:
            self.free = self.spent  # a smaller write later does not fit either: whoever filled the disk goes on
        return fit

    def _limited_open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **others: Any) -> Any:
        if not set(mode) & set("wax+") or "opener" in others or not self.is_here(file):
            return self._open(file, mode, buffering, *arguments, **others)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *arguments, **others)


class _Raw(io.FileIO):
    disk: FullDisk

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if not (fit := self.disk.take(len(view))) and len(view):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(view[:fit])
