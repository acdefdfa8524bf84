"""Events that a process causes in files below a directory, each told before it happens: places where a run can be killed."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


class Events:
    """Calls back before each event: a file opened to be written, renamed, removed, flushed to the disk, ...

    Args:
        under: the directory, absolute.
        react: called with the number of the event, from 1, and with what it is: "os.rename checkpoints/checkpoint-2".

    A write itself is no event: what was written is seen at the event after it; `tear` takes half of it back. Threads wait for
    each other here; where two write at once, the numbers of their events may differ from run to run.
    """

    def __init__(self, under: Path, react: Callable[[int, str], None]) -> None:
        self._under, self._react, self._count, self._reacting = str(under), react, 0, 0
        self._lock = threading.Lock()
        self._last_opened, self._size_before = "", 0
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync, self._of_descriptor)
        self._wrap_save_file()

    def tear(self) -> None:
        """Cut off half of what was written to the file that was opened last, if it has its name still."""
        if os.path.isfile(self._last_opened):
            written = os.path.getsize(self._last_opened) - self._size_before
            os.truncate(self._last_opened, self._size_before + max(0, written) // 2)

    def _event(self, what: str, path: Any, opened: bool = False, appends: bool = False) -> None:
        if self._reacting == threading.get_ident() or isinstance(path, int) or path is None:
            return
        absolute = os.path.abspath(os.fsdecode(path))
        if absolute != self._under and not absolute.startswith(self._under + "/"):
            return
        with self._lock:
            self._count, self._reacting = self._count + 1, threading.get_ident()
            try:
                self._react(self._count, f"{what} {os.path.relpath(absolute, self._under)}")
            finally:
                self._reacting = 0
            if opened:
                self._last_opened = absolute
                self._size_before = os.path.getsize(absolute) if appends and os.path.isfile(absolute) else 0

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._event("open", arguments[0], opened=True, appends=not arguments[2] & os.O_TRUNC)
        elif name in CHANGES and not (name == "os.mkdir" and os.path.isdir(arguments[0])):
            self._event(name, arguments[0])

    @staticmethod
    def _of_descriptor(file: Any) -> str | None:
        descriptor = file if isinstance(file, int) else file.fileno()
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def _before(self, function: Callable[..., Any], path_of: Callable[[Any], Any]) -> Any:
        def call(file: Any, *arguments: Any, **others: Any) -> Any:
            self._event(f"os.{function.__name__}", path_of(file))
            return function(file, *arguments, **others)

        return call

    def _wrap_save_file(self) -> None:
        """Tell of safetensors' files, which Rust opens."""
        from safetensors import torch as tensors

        save = tensors.save_file

        def save_file(found: Any, filename: Any, *arguments: Any, **others: Any) -> None:
            self._event("save_file", filename, opened=True)
            save(found, filename, *arguments, **others)

        everywhere(save, save_file)


def everywhere(function: Any, replacement: Any) -> None:
    """Put a replacement in a function's place in every module that has imported it."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, replacement)
