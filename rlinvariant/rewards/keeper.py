"""The keeper of a cage: a process that has loaded a reward function, forks workers that call it, and ends those that must be.

It never calls the function itself, so nothing that the function does can stop it. Workers are forks, so that one that was
ended is replaced in milliseconds, without importing anything again.
"""

import asyncio
import inspect
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from rlinvariant import forks
from rlinvariant.launch import end_with_parent
from rlinvariant.rewards.grades import Attempt, Failure, Graded, attempt, cut, merged, raised, to_retry
from rlinvariant.rewards.parent import leave_signals
from rlinvariant.types import RewardCall

FORK = multiprocessing.get_context("fork")
Arguments = Mapping[str, Any]


class TrainerGone(Exception):
    """Tells that the trainer has closed its end of the connection, or is gone."""


def main(descriptor: int, processes: int) -> None:
    """Load the function that the trainer sends, then grade batches until the trainer is gone."""
    import cloudpickle

    leave_signals()
    trainer = Connection(descriptor)
    try:
        function = _plain(cloudpickle.loads(trainer.recv_bytes()))
    except (Exception, SystemExit) as error:
        trainer.send(Failure("error", raised(error).text))
        return
    keeper = Keeper(function, processes, trainer)
    try:
        trainer.send(None)
        while True:
            arguments, logs, seed, limit_s = trainer.recv()
            trainer.send(keeper.grade(arguments, logs, seed, limit_s))
    except (TrainerGone, EOFError, ConnectionError):
        pass
    finally:
        for worker in keeper.workers:
            worker.end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs what `function` returns, if that is a coroutine, to its end."""

    def plain(**arguments: Any) -> Any:
        returned = function(**arguments)
        return asyncio.run(returned) if inspect.iscoroutine(returned) else returned

    return plain


class Worker:
    """Runs a process that calls the function, one part of a batch at a time."""

    def __init__(self, function: RewardCall) -> None:
        self._function = function
        self._start()

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self._process = FORK.Process(target=_work, args=(self._function, theirs, os.getpid()))
        with forks.inheriting():
            self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except ConnectionError:  # it died between two calls
            self.replace()
            self.connection.send(message)

    def receive(self) -> Attempt:
        """Return what came of a call; a failure if the process died over it, and then start another."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with exit code {code}"
            self.replace()
            return Attempt(Failure("crash", f"its process {how}"))

    def end(self) -> None:
        """End the process, and what it has started in its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it has not made its group yet
            os.kill(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self.connection.close()

    def replace(self) -> None:
        self.end()
        self._start()


class Keeper:
    """Grades batches with a fixed number of workers.

    Args:
        function: the reward function.
        processes: how many workers.
        trainer: the connection to the trainer, watched for its end.
    """

    def __init__(self, function: RewardCall, processes: int, trainer: Connection) -> None:
        self._trainer, self._parent = trainer, os.getppid()
        self.workers = [Worker(function) for _ in range(processes)]

    def grade(self, arguments: Arguments, logs: Sequence[str], seed: str, limit_s: float | None) -> Graded:
        """Grade a batch within the limit: cut into parts, one for each worker, and the samples of failed parts one by one.

        The parts have half of the limit. Each sample of a failed part has its share of what is left, so that one that never
        ends takes nothing from the others.
        """
        began, count = time.monotonic(), len(arguments["completions"])
        end = math.inf if limit_s is None else began + limit_s
        half = math.inf if limit_s is None else began + limit_s / 2
        n = len(self.workers)
        parts = [part for i in range(n) if (part := range(i * count // n, (i + 1) * count // n))]
        alone = count == 1  # then there is nothing to find out afterwards
        attempts = self._run(arguments, logs, seed, parts, lambda now, left: end if alone else half)
        singles = [[i] for i in to_retry(parts, attempts)]
        again = self._run(arguments, logs, seed, singles, lambda now, left: now + (end - now) / -(-left // n))
        return merged(parts, attempts, again)

    def _run(
        self,
        arguments: Arguments,
        logs: Sequence[str],
        seed: str,
        parts: Sequence[Sequence[int]],
        until: Callable[[float, int], float],
    ) -> list[Attempt]:
        """Call the function on each part; the first parts go to the workers in their order.

        Args:
            until: (time, parts that no worker has yet, with this one) -> when the part's call is ended.
        """
        waiting = deque(enumerate(parts))
        busy: dict[Worker, tuple[int, float, float]] = {}  # -> which part, when it began, when it is ended
        done: dict[int, Attempt] = {}
        while waiting or busy:
            for worker in self.workers:
                if waiting and worker not in busy:
                    now, left = time.monotonic(), len(waiting)
                    index, part = waiting.popleft()
                    worker.send((cut(arguments, part), logs, f"{seed} {part[0]}", part[0]))
                    busy[worker] = index, now, until(now, left)
            ready = self._wait(busy)
            for worker, (index, began, end) in list(busy.items()):
                if worker.connection in ready:
                    done[index] = worker.receive()
                elif (now := time.monotonic()) >= end:
                    worker.replace()
                    text = f"no answer within {now - began:.3g} s, its share of reward_timeout"
                    done[index] = Attempt(Failure("timeout", text))
                else:
                    continue
                del busy[worker]
        return [done[index] for index in range(len(parts))]

    def _wait(self, busy: Mapping[Worker, tuple[int, float, float]]) -> list[Any]:
        """Wait until a worker has something to say, or is to be ended."""
        first = min(end for _, _, end in busy.values())
        ready = wait([self._trainer, *(worker.connection for worker in busy)], max(0.0, min(1.0, first - time.monotonic())))
        if self._trainer in ready or os.getppid() != self._parent:  # the trainer sends nothing while it waits
            raise TrainerGone
        return ready


def _work(function: Callable[..., Any], keeper: Connection, parent: int) -> None:
    """Call the function on what the keeper sends, as a worker's process, until it is ended."""
    os.setpgid(0, 0)  # what the function starts is ended with it
    end_with_parent(signal.SIGKILL)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends, the kernel is to end this process, and not the trainer
    while os.getppid() == parent:
        try:
            arguments, logs, seed, first = keeper.recv()
        except (EOFError, ConnectionError):
            return
        _seed(seed)
        made = attempt(function, {**arguments, **dict.fromkeys(logs, True)}, first)
        if isinstance(made.result, Failure):
            made.result = Failure(made.result.kind, made.result.text)  # what was raised stays here
        try:
            keeper.send(made)
        except Exception as error:  # what it logged cannot be pickled
            keeper.send(Attempt(Failure("error", raised(error).text)))


def _seed(seed: str) -> None:
    """Seed the generators that a function may draw from, so that no grade depends on which process gives it."""
    random.seed(seed)
    number = random.getrandbits(32)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)
