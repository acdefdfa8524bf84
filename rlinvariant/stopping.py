"""The ways in which a signal ends a run.

    SIGTERM, SIGHUP, SIGUSR1    the optimizer step in progress is finished and saved, then the run ends; where no steps are
                                taken, or when it is the second signal, the run ends at once
    SIGINT (ctrl-C)             the run ends at once

A signal that is ignored when the run starts, as SIGHUP is under nohup, stays ignored. If a step does not end in time,
`deadline` ends the run. With several processes, all end after the same step: `StepRecord` tells each what any has been asked,
and `after_a_step` does so after the last step.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from rlinvariant import deadline, forks
from rlinvariant.errors import Stopped

ECHO_S = 3.0  # a launcher passes on what came to all processes of a job: within this time it is the same signal

Handler = Callable[[int, FrameType | None], None]


class Control(Protocol):
    """Describes the flags of transformers' `TrainerControl` that stop a training."""

    should_save: bool
    should_evaluate: bool
    should_training_stop: bool


class _State:
    """Holds what this process has been asked by signals."""

    number = 0  # the first signal, of this or of another process of the run
    came = 0.0  # when it came to this one
    taking_steps = False
    ending = False  # the run's last words are being written
    lost = False  # an exception that was to end the process came to nothing
    clock: subprocess.Popen[bytes] | None = None  # the process of `deadline`, while this one listens


_state = _State()


def _forked() -> None:
    """Make a fork of the process that listens one whose signals `deadline` does not count."""
    if _state.clock is None or _state.clock.stdin is None:
        return
    signal.set_wakeup_fd(-1)
    _state.clock.stdin.close()
    _state.clock = None


os.register_at_fork(after_in_child=_forked)


@contextmanager
def handled(handler: Handler, also_ignored: tuple[int, ...] = ()) -> Iterator[None]:
    """Call `handler` for the signals that end a run while a block runs.

    Args:
        also_ignored: signals that are handled though they were ignored before.
    """
    before = {number: signal.getsignal(number) for number in deadline.WITHIN_S}
    mine = [number for number, old in before.items() if old != signal.SIG_IGN or number in also_ignored]
    for number in mine:
        signal.signal(number, handler)
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: _again(unraisable, hook)
    try:
        yield
    finally:
        sys.unraisablehook, _state.lost = hook, False
        for number in mine:
            signal.signal(number, before[number])


def _again(unraisable: "sys.UnraisableHookArgs", otherwise: Callable[["sys.UnraisableHookArgs"], object]) -> None:
    """Send a signal again whose exception rose where Python drops exceptions, as in a finaliser, and so ended nothing."""
    if not isinstance(unraisable.exc_value, Stopped):
        otherwise(unraisable)
        return
    _state.lost, number = True, unraisable.exc_value.number

    def send() -> None:
        if _state.lost:  # else nobody listens any more
            os.kill(os.getpid(), number)

    timer = threading.Timer(0.05, send)  # once the finaliser is over
    timer.daemon = True
    timer.start()


def raise_stopped(number: int, _: FrameType | None = None) -> None:
    """Handle a signal by the exception that ends the process.

    Raises:
        Stopped: always.
    """
    raise Stopped(number)


@contextmanager
def listening(go_on: str, echo_s: float, speaks: bool) -> Iterator[None]:
    """Let signals end the run that the block is, as the table above says.

    Args:
        go_on: how to go on with the run, as `Config.again` says, for the last line of one that had to be killed.
        echo_s: ECHO_S where a launcher may pass on what this process gets too, else 0.
        speaks: whether this is the process that prints.
    """

    def handler(number: int, _: FrameType | None) -> None:
        again, lost, _state.lost = _state.came > 0, _state.lost, False
        if again and not lost and time.monotonic() - _state.came < echo_s:
            return
        if not again:
            _state.number, _state.came = _state.number or number, time.monotonic()
        if again or number == signal.SIGINT or not (_state.taking_steps or _state.ending):
            raise Stopped(number)
        if speaks and _state.taking_steps:
            said = f"{signal.Signals(number).name}: the run ends when this step is done and saved"
            os.write(2, f"{said}, after {deadline.WITHIN_S[number]:.0f} s at most; once more ends it at once\n".encode())

    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    arguments = [os.getpid(), go_on if speaks else "", echo_s, deadline.FORCE_AFTER_S, json.dumps(deadline.WITHIN_S)]
    clock = subprocess.Popen([sys.executable, "-I", "-S", deadline.__file__, *map(str, arguments)], stdin=subprocess.PIPE)
    assert clock.stdin is not None
    os.set_blocking(clock.stdin.fileno(), False)
    before = signal.set_wakeup_fd(clock.stdin.fileno(), warn_on_full_buffer=False)
    _state.clock = clock
    forks.keep_to_itself(deadline.WITHIN_S)
    try:
        with handled(handler):
            yield
    finally:
        forks.keep_to_itself(())
        signal.set_wakeup_fd(before)
        clock.stdin.close()
        clock.kill()  # it would wait for whoever still has its pipe, as what a library has forked
        clock.wait()
        _state.number, _state.came, _state.clock = 0, 0.0, None


@contextmanager
def after_a_step(agree: Callable[[int], int] = int) -> Iterator[None]:
    """Let the block, which takes steps, end by `obey` before it is asked to stop by an exception.

    Args:
        agree: takes what this process was asked for, as `asked` says, and returns the same number in all processes of the run:
            a signal may have reached one of them only, after the last step.

    Raises:
        Stopped: a signal came to this process, or to another of the run; all of them are after the same step.
    """
    _state.taking_steps, agreed = True, 0
    try:
        yield
        agreed = agree(_state.number)
    finally:
        _state.taking_steps = False
    if agreed or _state.number:  # or it came since
        raise Stopped(agreed or _state.number, after_step=agreed > 0)


@contextmanager
def ending() -> Iterator[None]:
    """Let the block, which is the last of a run, come to its end before a signal ends the run at once."""
    _state.ending = True
    try:
        yield
    finally:
        _state.ending = False


def asked() -> int:
    """Return the number of the signal that asks the run to end after this step; 0 if none does."""
    return _state.number


def obey(number: int, control: Control) -> None:
    """Save and stop after this step, if any process of the run was asked to; all of them call this with the same number."""
    if number:
        _state.number = number
        control.should_save = control.should_training_stop = True
