"""Nine ways in which a reward function misbehaves on the sample "bad"; every other gets 1.0. And a process that calls one.

    python -m tests.rewards.misbehaviours NAME TIMEOUT CAGE ERRORS DIRECTORY

calls the function through `checked_reward`, and through TRL's kind of event loop if it is async; prints `calling`, then the
rewards and what was counted. TIMEOUT 0: without a watchdog.
"""

import asyncio
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMPLETIONS = ["good", "good", "bad", "good"]


def sleep() -> None:
    time.sleep(10**6)


def busy_in_c() -> None:
    """Hold the interpreter, which no timer and no signal handler of Python's ends."""
    all(itertools.repeat(True))


def busy_in_python() -> None:
    while True:
        pass


def swallows() -> None:
    """Take every exception for a reason to try again."""
    while True:
        try:
            time.sleep(10**6)
        except BaseException:
            continue


def exits() -> None:
    sys.exit(0)


def exits_at_once() -> None:
    os._exit(0)


def segfault() -> None:
    ctypes.string_at(0)


def killed() -> None:
    """End as the kernel ends the largest process where memory ends."""
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ValueError("cannot parse \x1b[31m this")


BAD: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (sleep, busy_in_c, busy_in_python, swallows, exits, exits_at_once, segfault, killed, raises)
}


def reward_of(name: str) -> Any:
    """Return the function that does what `name` says where it meets "bad"; `async_sleep` awaits instead."""

    def misbehaves(completions: list[str], **_: Any) -> list[float]:
        for text in completions:
            if text == "bad":
                BAD[name]()
        return [1.0] * len(completions)

    async def async_misbehaves(completions: list[str], **_: Any) -> list[float]:
        for text in completions:
            if text == "bad":
                if name == "async_sleep":
                    await asyncio.sleep(10**6)
                else:
                    BAD[name.removeprefix("async_")]()
        return [1.0] * len(completions)

    return async_misbehaves if name.startswith("async_") else misbehaves


def call(reward: Any, **arguments: Any) -> list[float | None]:
    """Call as TRL does: an async function on a loop in a thread, while the main thread waits."""
    if not asyncio.iscoroutinefunction(reward):
        return reward(**arguments)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return asyncio.run_coroutine_threadsafe(reward(**arguments), loop).result()


def end(error: BaseException) -> None:
    """End as a command does that was refused, though a thread may never end."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def main(name: str, timeout: float, cage: int, errors: Any, directory: str) -> None:
    from rlinvariant.rewards import RewardLimits, checked_reward, watchdog

    if name not in UNREACHABLE:
        watchdog.KILL_AFTER_S = 600.0  # a signal is enough for these, and a loaded machine may answer it late
    counts: Counter[str] = Counter()
    reward = checked_reward(reward_of(name), RewardLimits(timeout, cage, errors), lambda k, n: counts.update({k: n}))
    watchdog.watchdog().leave(Path(directory, "result.json"), {"finished": False, "outcome": "failed"})
    state = SimpleNamespace(global_step=6, log_history=[])
    print("calling", flush=True)
    try:
        rewards = call(reward, prompts=["?"] * 4, completions=COMPLETIONS, completion_ids=[[0]] * 4, trainer_state=state)
    except watchdog.OverdueReward as overdue:  # as rlinvariant.trainer.grading
        watchdog.watchdog().abandon()
        end(overdue)
    except Exception as error:
        end(error)
    else:
        print(json.dumps({"rewards": rewards, "counts": counts}), flush=True)


NINE = ("sleep", "async_sleep", "busy_in_c", "busy_in_python", "exits", "exits_at_once", "segfault", "killed", "raises")
LATE = {"sleep", "async_sleep", "busy_in_c", "busy_in_python", "swallows", "async_busy_in_c", "async_busy_in_python"}
UNREACHABLE = {"busy_in_c", "swallows", "async_busy_in_c"}  # by a signal that Python answers
ENDS_THE_PROCESS = {"exits_at_once": 0, "segfault": -signal.SIGSEGV, "killed": -signal.SIGKILL}
SAYS = {
    "exits": "raised SystemExit: 0",
    "raises": r"raised ValueError: cannot parse \x1b[31m this",
    "exits_at_once": "its process ended itself with exit code 0",
    "segfault": "its process was ended by SIGSEGV",
    "killed": "its process was ended by SIGKILL",
}


@dataclass
class Found:
    """Tells what a process did that called a misbehaving function: `seconds` from call to end; None: it hung and was killed."""

    name: str
    cage: int
    errors: str
    seconds: float | None
    code: int
    said: str
    printed: str
    result: dict[str, Any]

    @property
    def faults(self) -> list[str]:
        """Say what is not as the configuration demands, but for the time."""
        kind = "timeout" if self.name in LATE else "crash" if self.name in ENDS_THE_PROCESS else "error"
        words = SAYS.get(self.name, "no answer within")
        if self.cage or kind == "error":
            words = f", step 7, sample 2: {words}"
            code = 1 if self.errors == "stop" else 0
        elif kind == "crash":
            words, code = ", step 7: the trainer ended while this ran", ENDS_THE_PROCESS[self.name]
        else:
            words, code = f", step 7: {words}", -signal.SIGKILL if self.name in UNREACHABLE else 1
        faults = [] if self.seconds is not None else ["hangs"]
        faults += [] if self.code == code else [f"exit code {self.code}, expected {code}"]
        faults += [] if words in self.said else [f"says {self.said!r}, expected {words!r}"]
        faults += [] if "\x1b" not in self.said else ["escape sequence on the terminal"]
        if not self.cage and (kind == "crash" or self.name in UNREACHABLE) and words not in str(self.result.get("error")):
            faults.append(f"leaves {self.result}")
        if code == 0 and kind != "crash" or self.cage and self.errors != "stop":
            instead = 0.0 if self.errors == "zero" else None
            expected = {"rewards": [1.0, 1.0, instead, 1.0], "counts": {kind: 1}}
            faults += [] if self.printed and json.loads(self.printed) == expected else [f"gives {self.printed!r}"]
        return [f"{self.name}, cage={self.cage}, {self.errors}: {fault}" for fault in faults]


def found(name: str, cage: int, errors: str, timeout: float, patience: float = 300.0) -> Found:
    """Call a misbehaving function in a process of its own; end that after `patience` seconds."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", __name__, name, str(timeout), str(cage), errors, directory]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], **pipes)
        assert process.stdout and process.stderr and process.stdout.readline() == "calling\n"
        began = time.monotonic()
        try:
            process.wait(patience)
            seconds = time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            seconds = None
        printed, said = process.stdout.read(), process.stderr.read()
        file = Path(directory, "result.json")
        result = json.loads(file.read_text()) if file.exists() else {}
        return Found(name, cage, errors, seconds, process.returncode, said, printed, result)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
