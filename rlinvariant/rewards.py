"""A guard at the user's border: reward functions, with errors that say where. And the grader of mathematics."""

import asyncio
import functools
import inspect
import json
import math
import numbers
import os
import queue
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.install import install_hint

GRADING_CPU_S = 2  # of one answer: fifty times what an honest one takes
GRADING_BYTES = 4 << 30  # of one grader's address space
LONGEST_ANSWER = 500  # characters


def checked_reward(reward: Any) -> Any:
    """Wrap a TRL reward function so that a failure names the function, the step and the sample.

    The wrapper keeps the function's name, which TRL logs, and is a coroutine function if `reward` is one. `None`
    passes: it is TRL's way to say that a reward does not apply to a sample. Reward models pass through unwrapped.

    Raises (the wrapper):
        UserError: the function raised, or returned another number of rewards than there are completions, or one that
            is not a finite number.
    """
    if not inspect.isroutine(reward) and (not callable(reward) or hasattr(reward, "forward")):
        return reward
    function: Callable[..., Any] = reward
    name = str(getattr(getattr(function, "func", function), "__name__", type(function).__name__))

    def failure(arguments: dict[str, Any], raised: Sequence[bool], error: Exception) -> UserError:
        # The function was called again on each sample alone, to find the one that it fails on.
        sample = f"sample {list(raised).index(True)}" if any(raised) else "no sample alone, only the whole batch"
        return UserError(f"{where(arguments)}, {sample}: raised {type(error).__name__}: {one_line(error)}")

    def where(arguments: dict[str, Any]) -> str:
        state = arguments.get("trainer_state")
        # global_step counts finished optimizer steps; the one in progress is the next.
        return f"reward function {name}" + (f", step {state.global_step + 1}" if state is not None else "")

    def synchronous(**arguments: Any) -> list[float | None]:
        try:
            rewards = function(**arguments)
        except Exception as error:
            raise failure(arguments, [_raises(function, one) for one in _singles(arguments)], error) from error
        return _validated(rewards, len(arguments["completions"]), where(arguments))

    async def asynchronous(**arguments: Any) -> list[float | None]:
        try:
            rewards = await function(**arguments)
        except Exception as error:
            results = await asyncio.gather(*[function(**one) for one in _singles(arguments)], return_exceptions=True)
            raise failure(arguments, [isinstance(result, Exception) for result in results], error) from error
        return _validated(rewards, len(arguments["completions"]), where(arguments))

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(reward).__call__)
    wrapper = asynchronous if is_async else synchronous
    wrapper.__name__ = wrapper.__qualname__ = name
    return wrapper


def _singles(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each sample alone: lists that have one entry per completion are cut."""
    count = len(arguments["completions"])
    per_sample = {key for key, value in arguments.items() if isinstance(value, list) and len(value) == count}
    return [
        {key: value[index : index + 1] if key in per_sample else value for key, value in arguments.items()}
        for index in range(count)
    ]


def _raises(function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        function(**arguments)
    except Exception:  # the caller holds the error; this only finds the sample
        return True
    return False


def _validated(rewards: Any, count: int, where: str) -> list[float | None]:
    if isinstance(rewards, (str, bytes)) or not hasattr(rewards, "__len__") or not hasattr(rewards, "__iter__"):
        raise UserError(f"{where}: returned {type(rewards).__name__}, expected a list of {count} numbers")
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if len(rewards) != count:
        first = f", sample {len(rewards)} is the first without one" if len(rewards) < count else ""
        raise UserError(f"{where}: returned {len(rewards)} rewards, expected {count}, one per completion{first}")
    for index, value in enumerate(rewards):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise UserError(f"{where}, sample {index}: returned {value!r}, expected a finite number or None")
    return list(rewards)


def math_answer(
    completions: Sequence[Any], answer: Sequence[str], log_metric: Callable[[str, float], None] | None = None, **_: Any
) -> list[float]:
    """1 where a completion's final answer equals `answer`, by text or by math-verify, else 0; in TRL's signature.

    math-verify runs in processes of their own, which the kernel ends after GRADING_CPU_S of their time or at
    GRADING_BYTES: an answer such as 9^9^9^9 costs a completion its reward, and nobody else anything. How many were ended so is
    logged as `grader_stopped`.

    Args:
        completions: text, or messages of which the last is graded.
        answer: what is right, LaTeX or plain.

    Raises:
        UserError: math-verify cannot be loaded.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    pool, graders = _graders()

    def grade(text: str, right: str) -> bool | None:
        found = final_answer(text)
        if found is None or len(found) > LONGEST_ANSWER:
            return False
        if found == right.strip():
            return True
        grader = graders.get()
        try:
            return grader.equal(right, found)
        finally:
            graders.put(grader)

    equal = list(pool.map(grade, texts, answer))
    if log_metric is not None:
        log_metric("grader_stopped", float(equal.count(None)))
    return [float(bool(same)) for same in equal]


def final_answer(text: str) -> str | None:
    r"""The contents of the last \boxed{}; without one, the rest of the line after the last `####`, `answer:` or `answer is`.

    Of \boxed{\frac{1}{2}} it is \frac{1}{2}; a box that is never closed is none. Takes time linear in the text.
    """
    if boxes := list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text)):
        text = text[boxes[-1].end() :]
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[: brace.start()].strip()
        return None
    phrases = list(re.finditer(r"####|\banswer\s*(?:is\b\s*:?|:)", text, re.IGNORECASE))
    line = text[phrases[-1].end() :].strip().partition("\n")[0].strip(" *.$") if phrases else ""
    return line or None


class _Grader:
    """A process that compares two answers at a time, and is started again when the kernel has ended it."""

    process: Any = None

    def equal(self, right: str, found: str) -> bool | None:
        """None if the process was ended over this question."""
        if self.process is None:
            code = "from rlinvariant.rewards import _grade; _grade()"
            paths = os.pathsep.join(path for path in sys.path if path)
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], text=True, env=os.environ | {"PYTHONPATH": paths}, **pipes
            )
            if self.process.stdout.readline() != "ready\n":
                raise UserError(f"math-verify: cannot be loaded; {install_hint('math')}, then: import math_verify")
        try:
            self.process.stdin.write(json.dumps([right, found]) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return reply == "equal\n"
        self.process.kill()
        self.process.wait()
        self.process = None
        return None


@functools.cache
def _graders() -> "tuple[ThreadPoolExecutor, queue.SimpleQueue[_Grader]]":
    """As many graders as cores, up to 8, and as many threads to wait for them."""
    count = min(8, os.cpu_count() or 1)
    graders: queue.SimpleQueue[_Grader] = queue.SimpleQueue()
    for _ in range(count):
        graders.put(_Grader())
    return ThreadPoolExecutor(count, "grader"), graders


def _grade() -> None:
    """A grader's main loop: a JSON line [right, found] in, `equal` or `different` out."""
    import logging
    import resource
    import signal

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (GRADING_BYTES, GRADING_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's: it ends this process by closing the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also in the middle of one long multiplication
    replies, sys.stdout = sys.stdout, sys.stderr

    def parsed(text: str) -> list[Any]:
        return parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        right, found = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, GRADING_CPU_S)
        equal = verify(parsed(right), parsed(found), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("equal" if equal else "different", file=replies, flush=True)
