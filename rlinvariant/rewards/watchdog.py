"""A time limit that holds against anything: another process counts, since a call can stop every timer inside its own.

When a call passes its limit, the watchdog sends a signal, which Python answers with `OverdueReward`, wherever the main thread
is. A call that holds the interpreter (a loop in C) cannot be reached so: KILL_AFTER_S later the trainer is killed.
"""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlinvariant.rewards.limits import Limits
from rlinvariant.types import JsonObject

SIGNAL = signal.SIGRTMIN + 5  # one that batch systems, launchers and libraries leave alone
KILL_AFTER_S = 1.5
HEARTBEAT_S = 30.0


class OverdueReward(BaseException):
    """Ends a reward function or a tool past its limit, from inside. It is no Exception, which user code might swallow."""


class Watchdog:
    """Tells the watchdog's process which calls run. The process starts with the first call, and again should it be gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ids = itertools.count()
        self._running: dict[int, tuple[float, str]] = {}  # call -> when it is overdue, and the line about it
        self._result: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._can_signal = False

    def listen(self) -> None:
        """Answer the signal, if this is the main thread: no other can. Without it, a call past its limit is a kill."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(SIGNAL, self._overdue)
            self._can_signal = True

    def leave(self, path: Path, result: JsonObject) -> None:
        """Let the watchdog write `result`, with `error` and `seconds`, should it have to kill this process."""
        self._result = {"result": result, "path": str(path.absolute()), "began": time.monotonic()}
        with self._lock:
            if self._process is not None:
                self._send(self._result)

    @contextmanager
    def watching(self, line: str, limits: Limits, later_s: float = 0.0) -> Iterator[None]:
        """Watch a call of a reward function or a tool.

        Args:
            line: names function and step.
            limits: how long it may take. In a cage it is only said that it runs long: the cage ends it.
            later_s: how long after the limit the signal comes, where the call ends itself in time if it can.

        Raises:
            OverdueReward: the limit has passed, if the block runs in the main thread.
        """
        if not self._can_signal:
            self.listen()
        call, began, limit_s = next(self._ids), time.monotonic(), None if limits.processes else limits.limit_s
        signal_s = None if limit_s is None else limit_s + later_s
        message = {"begin": call, "line": line, "error": limits.overdue(line), "began": began, "limit_s": limits.limit_s}
        message |= {"signal_s": signal_s if self._can_signal else None, "heartbeat_s": HEARTBEAT_S}
        message |= {"kill_s": None if limit_s is None else limit_s + KILL_AFTER_S}
        message |= {"gone": None if limits.processes else limits.gone(line)}
        self._running[call] = (math.inf if signal_s is None else began + signal_s, limits.overdue(line))
        try:
            with self._lock:
                self._send(message)
            yield
        finally:
            self._end(call)

    def abandon(self) -> None:
        """Forget calls that still run, in threads that nothing can end, now that the run ends because of them."""
        for call in list(self._running):
            self._end(call)

    def _end(self, call: int) -> None:
        if self._running.pop(call, None):
            with self._lock:
                self._send({"end": call})

    def _overdue(self, *_: Any) -> None:
        now = time.monotonic()
        for due, error in list(self._running.values()):
            if now >= due:
                raise OverdueReward(error)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for _ in range(2):
            if self._process is None:
                self._start()
            try:
                os.write(self._pipe, data)
                return
            except BrokenPipeError:  # something has ended the process
                self._process = None

    def _start(self) -> None:
        script = Path(__file__).with_name("watch.py")
        command = [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(int(SIGNAL))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        if self._result is not None:
            self._send(self._result)


@functools.cache
def _of_process(pid: int) -> Watchdog:
    return Watchdog()


def watchdog() -> Watchdog:
    """Return this process's watchdog; a fork has another."""
    return _of_process(os.getpid())
