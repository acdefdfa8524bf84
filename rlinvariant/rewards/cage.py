"""A reward function in processes of its own: the trainer's side, which sends batches to the cage's keeper."""

import importlib.machinery
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import cloudpickle

from rlinvariant.errors import UserError
from rlinvariant.rewards.grades import Graded, raised
from rlinvariant.rewards.limits import Limits
from rlinvariant.types import RewardArguments, RewardCall

CODE = "import sys; from rlinvariant.rewards.keeper import main; main(int(sys.argv[1]), int(sys.argv[2]))"
START_S = 300.0  # of a keeper, by the clock, at least: it imports what the function needs, which is no part of a call
KEEPER_GRACE_S = 30.0  # beyond the limit of a call, which the keeper itself holds


class Cage:
    """Runs a reward function in `reward_cage` processes, which a keeper starts and ends.

    Args:
        function: a reward function, plain or async.
        name: its name, for messages.
        limits: how many processes, and how long a call may take.
        kind: what it is, for messages.

    Raises:
        UserError: the function cannot be sent to another process, or cannot be loaded there.
    """

    def __init__(self, function: RewardCall, name: str, limits: Limits, kind: str = "reward function") -> None:
        self._name, self._limits, self._kind = name, limits, kind
        self._lock = threading.Lock()
        self._close: Callable[[], object] | None = None
        try:
            self._pickled = pickled(function)
        except Exception as error:
            raise self._refusal(f"cannot be pickled: {raised(error).text}") from error
        self._start()

    def _refusal(self, problem: str) -> UserError:
        fix = f"define it in a file or without what it encloses, or use {self._limits.uncaged}"
        return UserError(f"{self._limits.caged}: {self._kind} {self._name}: {problem}; {fix}")

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        paths = os.pathsep.join(path for path in sys.path if path)
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", CODE, str(theirs.fileno()), str(self._limits.processes)],
            env=os.environ | {"PYTHONPATH": paths},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C is the trainer's
        )
        theirs.close()
        self._close = weakref.finalize(self, _end, self._keeper, self._connection)
        self._connection.send_bytes(self._pickled)
        failure = self._answer(None if self._limits.limit_s is None else max(START_S, self._limits.limit_s))
        if failure is not None:
            self._close()
            self._close = None
            raise self._refusal(f"cannot be loaded in another process: {failure.text}")

    def grade(self, arguments: RewardArguments) -> Graded:
        """Grade a batch of samples; takes no longer than the limit, whatever the function does.

        Raises:
            UserError: the arguments cannot be sent, or the keeper itself was ended in the middle of the call.
        """
        sent = {key: value for key, value in arguments.items() if key not in ("log_metric", "log_extra")}
        seed = self._name
        if (state := sent.get("trainer_state")) is not None:
            # Plain, so that no process has to import transformers to read it; and the history grows with the run.
            sent["trainer_state"] = SimpleNamespace(**{**vars(state), "log_history": []})
            seed = f"{self._name} {state.global_step}"
        logs = [key for key in ("log_metric", "log_extra") if key in arguments]
        with self._lock:
            if self._close is not None and self._keeper.poll() is not None:  # ended between two calls: nothing is lost
                self._close()
                self._close = None
            if self._close is None:
                self._start()
            try:
                self._connection.send((sent, logs, seed, self._limits.limit_s))
                return self._answer(None if self._limits.limit_s is None else self._limits.limit_s + KEEPER_GRACE_S)
            except BaseException:  # an answer that comes late must not be taken for the next call's
                if self._close is not None:
                    self._close()
                self._close = None
                raise

    def _answer(self, limit_s: float | None) -> Any:
        try:
            if self._connection.poll(limit_s):
                return self._connection.recv()
            problem = f"did not answer within {limit_s:g} s"
        except (EOFError, ConnectionError):
            problem = "was ended from outside"
        raise UserError(f"{self._kind} {self._name}: the process that keeps its cage {problem}")


def pickled(function: RewardCall) -> bytes:
    """Pickle a function; by value where another process cannot import it by name, as that of a recipe's file."""
    inner = getattr(function, "func", function)
    names = {getattr(x, "__module__", None) for x in (function, inner, type(function))} & sys.modules.keys()
    by_value = [sys.modules[name] for name in names if name is not None and not _importable(name)]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(function)
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    top = name.partition(".")[0]
    return top == "__main__" or top in sys.builtin_module_names or importlib.machinery.PathFinder.find_spec(top) is not None


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """End a keeper: it kills its workers when the connection closes."""
    connection.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
