"""Signals that a process handles and its forks do not: a fork is ended by its own signals as usual, and loses none."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class _State:
    """Holds what this process's forks are made of."""

    numbers: frozenset[int] = frozenset()  # the signals
    inherits = False  # whether a fork handles them too


_state = _State()
_mask = threading.local()  # `before`: the signals that a thread had blocked when it began to fork


def keep_to_itself(numbers: Iterable[int]) -> None:
    """Have signals, which this process handles, end its forks from now on; with no number, let forks inherit everything."""
    _state.numbers = frozenset(numbers)


@contextmanager
def inheriting() -> Iterator[None]:
    """Let a process that the block forks handle signals as this one does, and keep them to itself."""
    _state.inherits = True
    try:
        yield
    finally:
        _state.inherits = False


def _before() -> None:
    """Hold signals back, of which a fork would lose one that comes before it is ready."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _state.numbers)


def _after() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _forked() -> None:
    if not _state.inherits:
        for number in _state.numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _state.numbers = frozenset()
    _state.inherits = False
    _after()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_forked)
