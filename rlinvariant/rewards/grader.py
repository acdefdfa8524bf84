"""The grader of mathematics: final answers, compared by math-verify in processes of their own."""

import functools
import json
import os
import queue
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.install import install_hint
from rlinvariant.launch import end_with_parent
from rlinvariant.rewards.parent import leave_signals

GRADING_CPU_S = 2  # of one answer: fifty times what an honest one takes
GRADING_S = 60.0  # by the clock, for what takes no time of the CPU: so much more that a busy machine changes no grade
STARTING_S = 300.0  # of a grader, by the clock: it imports SymPy
GRADING_BYTES = 4 << 30  # of one grader's address space
LONGEST_ANSWER = 500  # characters


def math_answer(
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str],
    log_metric: Callable[[str, float], None] | None = None,
    **_: object,
) -> list[float]:
    """Give 1 where a completion's final answer equals `answer`, by text or math-verify, else 0; in TRL's signature.

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
    r"""Return what is in the last \boxed{}, without one the rest of the line after the last `####`, `answer:` or `answer is`.

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
    """Holds a process that compares two answers at a time, and starts another when it was ended."""

    process: Any = None

    def equal(self, right: str, found: str) -> bool | None:
        """Return whether the answers are equal; None if the process was ended over this question."""
        if self.process is not None and self.process.poll() is not None:  # between two questions: no answer is to blame
            self._end()
        if self.process is None:
            self._start()
        process: Any = self.process
        try:
            process.stdin.write(json.dumps([right, found]) + "\n")
            process.stdin.flush()
            reply = self._line(GRADING_S)
        except BrokenPipeError:
            reply = ""
        if reply:
            return reply == "equal\n"
        self._end()
        return None

    def _start(self) -> None:
        code = "from rlinvariant.rewards.grader import main; main()"
        paths = os.pathsep.join(path for path in sys.path if path)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], text=True, env=os.environ | {"PYTHONPATH": paths}, **pipes
        )
        if self._line(STARTING_S) != "ready\n":
            self._end()
            raise UserError(f"math-verify: cannot be loaded; {install_hint('math')}, then: import math_verify")

    def _line(self, limit_s: float) -> str:
        """Return the line that the process writes next; "" if it is gone, or has written none within the limit."""
        poll = select.poll()  # no select(), which takes no descriptor above 1023
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll(1000 * limit_s) else ""

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not written any more
                pipe.close()
        self.process = None


@functools.cache
def _graders() -> "tuple[ThreadPoolExecutor, queue.SimpleQueue[_Grader]]":
    """Start as many graders as cores, up to 8, and as many threads to wait for them."""
    count = min(8, os.cpu_count() or 1)
    graders: queue.SimpleQueue[_Grader] = queue.SimpleQueue()
    for _ in range(count):
        graders.put(_Grader())
    return ThreadPoolExecutor(count, "grader"), graders


def main() -> None:
    """Answer, as a grader's process, each JSON line [right, found] by `equal` or `different`."""
    import logging
    import resource
    import signal

    end_with_parent(signal.SIGKILL)
    leave_signals()

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (GRADING_BYTES, GRADING_BYTES))
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
