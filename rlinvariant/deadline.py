"""A process beside a trainer, which ends it if a signal has not ended it in time: `python -I -S deadline.py PID ...`.

The trainer's signal handler in C writes each signal's number into this process's standard input (`signal.set_wakeup_fd`), also
while a call holds the interpreter, as a loop in C does. Nothing inside the trainer could do that.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping

WITHIN_S: dict[int, float] = {signal.SIGINT: 10.0, signal.SIGTERM: 25.0, signal.SIGHUP: 25.0, signal.SIGUSR1: 600.0}
"""The signals that end a run, and how many seconds each leaves it: SIGINT for result and report alone, the others for the step
in progress and its checkpoint too. Slurm and Kubernetes kill 30 s after their SIGTERM; SIGUSR1 comes as early as its user asks.
"""
FORCE_AFTER_S = 3.0  # how long a run has that was told to end at once


def watch(trainer: int, go_on: str, echo_s: float, force_after_s: float, within_s: Mapping[int, float]) -> None:
    """Wait for signals of the trainer: repeat the first when its time is over, and kill the trainer if that does not help.

    Args:
        trainer: its process.
        go_on: how to go on with the run, for the last line; "" where another process says it.
        echo_s: a signal that comes again so soon is the same one, sent on by a launcher; 0 where there is none.
        force_after_s, within_s: as the constants.
    """
    number, began, due, told = 0, 0.0, float("inf"), False
    while True:
        now = time.monotonic()
        ready = select.select([0], [], [], None if due == float("inf") else max(0.0, due - now))[0]
        now = time.monotonic()
        if ready:
            received = os.read(0, 64)
            if not received:
                return  # the trainer has ended
            for byte in received:
                if byte not in within_s:  # one that a reward handles
                    continue
                if not number:
                    number, began, due = byte, now, now + within_s[byte]
                elif not told and now - began >= echo_s:
                    told, due = True, now + force_after_s
        elif not told:
            os.kill(trainer, number)
            told, due = True, now + force_after_s
        else:
            if go_on:
                said = f"killed: {signal.Signals(number).name} had not ended this run after {now - began:.0f} s; its newest"
                said += f" checkpoint is what is left; go on with: {go_on}"
                os.write(2, f"{said}\n".encode())
            os.kill(trainer, signal.SIGKILL)
            return


if __name__ == "__main__":
    for ignored in WITHIN_S:
        signal.signal(ignored, signal.SIG_IGN)  # they are for the trainer, whose end ends this process too
    limits = json.loads(sys.argv[5])
    watch(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), {int(k): s for k, s in limits.items()})
