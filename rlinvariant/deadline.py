"""A process beside a trainer, which ends it if a signal has not ended it in time: `python -I -S deadline.py PID ...`.

The trainer's signal handler in C writes each signal's number into this process's standard input (`signal.set_wakeup_fd`), also
while a call holds the interpreter, as a loop in C does. Nothing inside the trainer could do that.
"""

import os
import select
import signal
import sys
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that end a run: SIGINT at once, the others after the step in progress."""
STOP_WITHIN_S = 25.0
"""How long a signal may take to stop a run, its checkpoint included: Slurm and Kubernetes kill 30 s after their SIGTERM."""
INTERRUPT_WITHIN_S = 10.0  # the same for SIGINT, after which only the result and the report are written
FORCE_AFTER_S = 3.0  # how long a run has that was told to end at once


def watch(trainer: int, run: str, echo_s: float, stop_within_s: float, interrupt_within_s: float, force_after_s: float) -> None:
    """Wait for signals of the trainer: repeat the first when its time is over, and kill the trainer if that does not help.

    Args:
        trainer: its process.
        run: the run's directory, for the last line; "" where another process says it.
        echo_s: a signal that comes again so soon is the same one, sent on by a launcher; 0 where there is none.
        stop_within_s, interrupt_within_s, force_after_s: as the constants.
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
                if byte not in SIGNALS:  # one that a reward handles
                    continue
                if not number:
                    within = interrupt_within_s if byte == signal.SIGINT else stop_within_s
                    number, began, due = byte, now, now + within
                elif not told and now - began >= echo_s:
                    told, due = True, now + force_after_s
        elif not told:
            os.kill(trainer, number)
            told, due = True, now + force_after_s
        else:
            if run:
                said = f"killed: {signal.Signals(number).name} had not ended this run after {now - began:.0f} s; its newest"
                said += f" checkpoint is what is left; go on with: rlinvariant resume {run}"
                os.write(2, f"{said}\n".encode())
            os.kill(trainer, signal.SIGKILL)
            return


if __name__ == "__main__":
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)  # they are for the trainer, whose end ends this process too
    watch(int(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:7]))
