"""The first acts of a reward function's helper process: it will not outlive its parent, and leaves signals to the trainer."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1
LEFT_TO_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a batch system sends to all processes of a run, whose trainer may be saving."""


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def leave_signals() -> None:
    """Do nothing at a signal that is the trainer's. What this process starts by `exec` does not inherit it."""
    for number in LEFT_TO_THE_TRAINER:
        signal.signal(number, lambda *_: None)
