"""The watchdog's process: it knows which calls run, says when one runs long, and ends the trainer when one runs too long.

Run as a script, with the standard library alone, so that it starts in milliseconds: `python -I watch.py PID SIGNAL`. Each line
of its standard input is JSON, one of

    {"begin": 3, "line": "reward function f, step 7", "error": "...", "gone": "...", "began": 71.5, "limit_s": 600,
     "signal_s": 600, "kill_s": 601.5, "heartbeat_s": 30}      times are of CLOCK_MONOTONIC, which all processes share;
                                                               limits, and what to say when the trainer is gone, may be null
    {"end": 3}
    {"result": {...}, "path": "runs/a/result.json", "began": 12.5}      what to leave there should the trainer be killed
"""

import contextlib
import json
import os
import select
import signal
import sys
import time

WAKES_S = 1.0  # to see that the trainer is there


def main(trainer: int, number: int) -> None:
    """Watch until the trainer closes the pipe or is gone."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # it ends with the trainer, which may be saving
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    calls: dict[int, dict] = {}
    leave: dict = {}
    rest = b""
    last = time.monotonic()
    while True:
        if select.select([0], [], [], _pause(calls, time.monotonic()))[0]:
            data = os.read(0, 1 << 16)
            if not data:  # the trainer has closed the pipe
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "begin" in message:
                    calls[message["begin"]] = message | {"next_s": message["heartbeat_s"], "signalled": None}
                elif "end" in message:
                    calls.pop(message["end"], None)
                else:
                    leave = message
        elif os.getppid() != trainer:  # it is gone, and somebody else holds the pipe
            break
        now = time.monotonic()
        if now - last > 5 * WAKES_S:  # this process was stopped, and the trainer with it (ctrl-Z): that is no call's time
            for call in calls.values():
                call["began"] += now - last
        last = now
        for call in calls.values():
            _look(call, now - call["began"], trainer, number, leave)
    for call in calls.values():  # the trainer is gone, in the middle of these
        if call["gone"] is not None:
            _report(call["gone"], leave)


def _pause(calls: dict, now: float) -> float:
    """Return the seconds until something is due."""
    due = [WAKES_S]
    for call in calls.values():
        times = [call["next_s"], _kill_s(call), call["signal_s"] if call["signalled"] is None else None]
        due += [call["began"] + seconds - now for seconds in times if seconds is not None]
    return max(0.0, min(due))


def _kill_s(call: dict) -> float | None:
    """Return when a call's trainer is killed, which had its time to answer the signal, however late this process sent it."""
    if call["kill_s"] is None or call["signal_s"] is None:
        return call["kill_s"]
    return None if call["signalled"] is None else call["kill_s"] + call["signalled"] - call["signal_s"]


def _look(call: dict, running_s: float, trainer: int, number: int, leave: dict) -> None:
    """Do what is due for a call: a line, a signal that Python code can answer, or the end."""
    kill_s = _kill_s(call)
    if kill_s is not None and running_s >= kill_s:
        _report(f"{call['error']}; it did not give the interpreter back, so the trainer was killed", leave)
        os.kill(trainer, signal.SIGKILL)
        sys.exit()
    if call["signal_s"] is not None and running_s >= call["signal_s"] and call["signalled"] is None:
        call["signalled"] = running_s
        os.kill(trainer, number)
    if running_s >= call["next_s"]:
        limit = f", limit {call['limit_s']:g} s" if call["limit_s"] is not None else ""
        _say(f"{call['line']}: has been running for {running_s:.0f} s{limit}")
        call["next_s"] *= 2


def _report(line: str, leave: dict) -> None:
    """Say what has ended the trainer, and leave it in the place that the trainer has named."""
    _say(f"error: {line}")
    if not leave:
        return
    result = leave["result"] | {"error": line, "seconds": time.monotonic() - leave["began"]}
    try:
        with open(f"{leave['path']}.{os.getpid()}", "w") as file:
            json.dump(result, file, indent=2)
        with contextlib.suppress(FileExistsError):  # what another process of the run has left is the cause of this
            os.link(file.name, leave["path"])
        os.remove(file.name)
    except OSError as error:
        _say(f"{leave['path']}: not written: {error}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{line}\n".encode(errors="replace"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
