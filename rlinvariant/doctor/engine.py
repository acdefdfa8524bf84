"""Does a real vLLM engine, in a process of its own, run what it should?"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from rlinvariant.doctor.finding import Finding
from rlinvariant.errors import one_line

ANSWER_SECONDS = 300  # after which an engine is taken to hang


def ask_engine() -> Iterator[Finding]:
    """Start vLLM's engine in a process that knows nothing of this one, and report what it says it runs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlinvariant.sampler.ask", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            fix = f"run {' '.join(command[:3])} DIRECTORY to see vLLM's log"
            yield Finding("engine", "problem", f"no answer in {ANSWER_SECONDS} s; {fix}")
            return
    took = f"{time.monotonic() - started:.0f} s"
    lines = done.stdout.splitlines()
    proof = next((x.removeprefix("exact: ") for x in lines if x.startswith("exact: ")), None)
    if done.returncode == 0 and proof is not None:
        yield Finding("engine", "ok", f"{proof} ({took})")
        return
    log = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    cause = next((x for x in log if re.search(r"\b\w+Error: ", x)), log[-1])  # the first: what follows is its consequence
    text = f"vLLM did not start exactly: {one_line(cause)}; run {' '.join(command[:3])} DIRECTORY to see vLLM's log"
    yield Finding("engine", "problem", text)
