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
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
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


def main(name: str, timeout: float, cage: int, errors: Any, directory: str) -> None:
    from rlinvariant.rewards import RewardLimits, checked_reward
    from rlinvariant.rewards.watchdog import OverdueReward, watchdog

    counts: Counter[str] = Counter()
    reward = checked_reward(reward_of(name), RewardLimits(timeout, cage, errors), lambda k, n: counts.update({k: n}))
    watchdog().leave(Path(directory, "result.json"), {"finished": False, "outcome": "failed"})
    state = SimpleNamespace(global_step=6, log_history=[])
    print("calling", flush=True)
    try:
        found = call(reward, prompts=["?"] * 4, completions=COMPLETIONS, completion_ids=[[0]] * 4, trainer_state=state)
    except OverdueReward as overdue:  # as rlinvariant.trainer.grading
        watchdog().abandon()
        raise SystemExit(f"error: {overdue}") from None
    except Exception as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({"rewards": found, "counts": counts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
