"""The first act of a reward function's helper process: it leaves signals to the trainer."""

import signal

from rlinvariant import forks

LEFT_TO_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a batch system sends to all processes of a run, whose trainer may be saving."""


def leave_signals() -> None:
    """Do nothing at a signal that is the trainer's. What this process starts does not inherit that, by `exec` or by a fork."""
    for number in LEFT_TO_THE_TRAINER:
        signal.signal(number, lambda *_: None)
    forks.keep_to_itself(LEFT_TO_THE_TRAINER)
