"""A terminal as a reader sees it while a spinner turns and libraries print: a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

# A library's warning, a logger made while the spinner turns, a second console, a bar, a line without an end
PROGRAM = """
import logging, sys, tqdm
from rlinvariant.report.console import Console

console = Console()
with console.stage("starting the engine"):
    shown = console._rich._live_stack[-1] if hasattr(console._rich, "_live_stack") else console._rich._live
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    shown.refresh()
    console.print("certificate: exact")
    print("Triton is installed", file=sys.stderr)
    shown.refresh()
    logging.info("a logger that was set up meanwhile")
    Console().print("another console")
    for _ in tqdm.tqdm(range(2), desc="Writing model shards", mininterval=0):
        shown.refresh()
    print("no end", end="")
    shown.refresh()
logging.info("the same logger afterwards")
"""
SEEN = [
    "certificate: exact",
    "Triton is installed",
    "a logger that was set up meanwhile",
    "another console",
    "no end",
    "starting the engine: done in",
    "the same logger afterwards",
]


def written(program: str, columns: int = 100) -> str:
    """All that a program writes to a terminal, escapes and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    read = bytearray()
    while True:
        try:
            some = os.read(ours, 2**16)
        except OSError:  # how Linux says that nobody holds the other end any more
            break
        if not some:
            break
        read += some
    os.close(ours)
    assert process.wait() == 0, read.decode()
    return read.decode()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            if part.endswith("A"):
                row -= int(part[2:-1] or 1)
            elif part.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line for line in lines if line.strip()]


def test_whatever_is_printed_while_a_spinner_turns_has_lines_of_its_own():
    text = written(PROGRAM)
    lines = screen(text)
    assert [re.sub(r" [\d.]+ s$", "", line) for line in lines] == SEEN
    assert "Writing model shards:  50%)" in text and "it/s" not in text  # a library's bar is said beside the spinner


def test_without_care_they_collide():
    """Control: rich alone lets them write where the spinner stands."""
    plain = "import rlinvariant.report.console as c, contextlib\nc.others_above = lambda *_: contextlib.nullcontext()\n"
    lines = screen(written(plain + PROGRAM))
    assert lines != SEEN and any("0:00:0" in line and "Triton is installed" in line for line in lines)
