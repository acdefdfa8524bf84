"""One terminal, several writers: a spinner that turns in the last line, and the lines that libraries print meanwhile.

Libraries write to sys.stdout and sys.stderr, and a logger that is set up while a spinner turns keeps the stream that it found.
So the streams stay what they are; only their `write` is replaced for the time, for everyone but the spinner.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_BAR = re.compile(r"(.*?(\d+)%)\|")  # as tqdm draws it: what is done, how much of it, and then the bar


class Screen:
    """Stands for the file that a rich console writes to: `file`, or whatever sys.stdout is at the time.

    While `is_live`, it writes past the replaced `write` of the stream, to the stream's own.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self.is_live = False

    @property
    def _stream(self) -> TextIO:
        return self._file or sys.stdout

    def write(self, text: str) -> int:
        stream = self._stream
        return type(stream).write(stream, text) if self.is_live else stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def others_above(screen: Screen, show: Callable[[str], None], progress: Callable[[str], None]) -> Iterator[None]:
    """Take whatever anybody but `screen` writes to a terminal, while a block runs.

    Args:
        screen: the file of the console that draws the spinner.
        show: called with each whole line; prints it above the spinner.
        progress: called with what a progress bar says ("Loading weights: 40%"), in place of the bar; "" once it is full.
    """
    replaced: list[tuple[Any, _Lines]] = []
    screen.is_live = True
    try:
        for stream in {id(s): s for s in (sys.stdout, sys.stderr) if s is not None and s.isatty()}.values():
            lines = _Lines(show, progress)
            stream.write = lines.write  # pyright: ignore[reportAttributeAccessIssue]
            replaced.append((stream, lines))
        yield
    finally:
        for stream, lines in replaced:
            del stream.write
            lines.end()
        screen.is_live = False


class _Lines:
    """Cuts what several threads write into lines, and tells bars from lines; no lock is held while a line is shown."""

    def __init__(self, show: Callable[[str], None], progress: Callable[[str], None]) -> None:
        self._show, self._progress = show, progress
        self._lock, self._rest = threading.Lock(), ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            rest = self._rest = _visible(self._rest)
        for line in lines:
            self._take(line, is_whole=True)
        self._take(rest, is_whole=False)
        return len(text)

    def end(self) -> None:
        self._take(self._rest, is_whole=True)

    def _take(self, line: str, is_whole: bool) -> None:
        line = _visible(line)
        if bar := _BAR.match(line):
            self._progress("" if bar[2] == "100" else bar[1])
        elif is_whole and line.strip():
            self._show(line)


def _visible(line: str) -> str:
    """Return what a terminal shows of a line: text after a carriage return is written over the text before it."""
    return line.rstrip("\r").rpartition("\r")[2]
