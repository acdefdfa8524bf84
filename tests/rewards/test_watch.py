"""The watchdog's process where it comes late, as on a loaded machine: a call has its time to answer the signal all the same."""

import signal
import subprocess
import sys

import pytest

from rlinvariant.rewards import watch

# A call that was overdue long ago when the watchdog hears of it; it answers the signal, or not
CALL = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, ANSWER)
command = [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), str(int(signal.SIGUSR1))]
watch = subprocess.Popen(command, stdin=subprocess.PIPE)
limits = {"limit_s": 1, "signal_s": 1, "kill_s": KILL, "heartbeat_s": 1e9}
call = {"begin": 0, "line": "f", "error": "late", "gone": None, "began": time.monotonic() - 1000}
watch.stdin.write(json.dumps(call | limits).encode() + b"\\n")
watch.stdin.flush()
time.sleep(600)
"""
ENDS, GOES_ON = "lambda *_: os._exit(7)", "lambda *_: None"


@pytest.mark.parametrize(("answer", "kill_s", "code"), [(ENDS, 601, 7), (GOES_ON, 1.2, -signal.SIGKILL)])
def test_a_watchdog_that_is_late_waits_for_the_answer_to_its_signal(answer, kill_s, code):
    """Control: where none comes it kills."""
    program = CALL.replace("ANSWER", answer).replace("KILL", str(kill_s))
    done = subprocess.run([sys.executable, "-c", program, watch.__file__], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
