"""Run an ablation's runs one after the other, each in a process of its own, and go on where an earlier command ended."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlinvariant import checkpoints, deadline, held_out, reading, stopping
from rlinvariant.ablate.arms import Arm
from rlinvariant.ablate.plan import Plan
from rlinvariant.errors import stop_code
from rlinvariant.launch import LAUNCHER
from rlinvariant.masking import masked_arguments
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir

PATIENCE_S = 5.0  # how much longer than it gives itself a run that got a signal is waited for, before it is killed


def run_all(plan: Plan, left: Sequence[tuple[Arm, int]], steps: int, console: Console, lock: int) -> list[str]:
    """Run one after the other, and return the names of those that failed; if the very first fails, no other is started."""
    failed: list[str] = []
    began = time.monotonic()
    # SIGINT also where it was ignored, as in a script's background: a run would inherit that and could not be stopped
    with stopping.handled(stopping.raise_stopped, also_ignored=(signal.SIGINT,)):
        for number, (arm, seed) in enumerate(left, start=1):
            run, name = plan.run_dir(arm, seed), f"{arm.name}/seed-{seed}"
            resume, note = prepare(run, steps)
            if note:
                console.print(f"{name}: {note}")
            try:
                with console.stage(f"[{number}/{len(left)}] {arm.name}, seed {seed}", steps) as advance:
                    _run(_command(plan, plan.arguments(arm, seed, resume)), run, advance, lock)
            except RunFailed as error:
                console.print(f"  {name} failed; {run.path / 'log.txt'} ends with")
                for line in error.lines:
                    console.print(f"    {line}")
                failed.append(name)
                if number == 1 and len(left) > 1:
                    console.print("the first run failed, as the others would: they are not started")
                    return failed
                continue
            seconds = (time.monotonic() - began) / number * (len(left) - number)
            console.print(f"  {_outcome(run)}" + (f"; about {max(1, round(seconds / 60))} min left" if seconds else ""))
    return failed


def prepare(run: RunDir, steps: int) -> tuple[bool, str]:
    """Return whether to resume, and what to say: an interrupted run goes on from its checkpoint, or is set aside."""
    if not run.config.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        return False, ""
    found, _ = checkpoints.newest(run.checkpoints)
    if found is not None and found.step <= steps:
        return True, f"was interrupted; goes on from its checkpoint of step {found.step}"
    aside = next(p for n in range(1, 10**6) if not (p := run.path.with_name(f"{run.path.name}.interrupted-{n}")).exists())
    run.path.rename(aside)
    run.path.mkdir()
    return False, f"was interrupted without a checkpoint to go on from; starts anew, and what there was is in {aside}"


class RunFailed(Exception):
    """Tells that a run ended without a result; `lines` are the end of its output."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)
        self.lines = list(lines)


def _command(plan: Plan, arguments: Sequence[str]) -> list[str]:
    """Return the command line of one run."""
    machine = [] if plan.launch is None else [f"machine={plan.launch}"]
    return [sys.executable, "-m", "rlinvariant.cli", "train", *machine, *arguments]


def _run(command: Sequence[str], run: RunDir, advance: Any, lock: int) -> None:
    """Start a run and wait for it, with its output in log.txt. Raises RunFailed if it leaves no result."""
    log = run.path / "log.txt"
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(masked_arguments(command))}\n".encode())
        file.flush()
        start = file.tell()
        # In a session of its own, so that ctrl-C reaches it once, from here
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        environment = os.environ | {LAUNCHER: str(os.getpid())}  # which the run ends with
        child = subprocess.Popen(command, **pipes, start_new_session=True, pass_fds=[lock], env=environment)
        number = signal.SIGKILL
        try:
            while True:
                try:
                    child.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    advance(_last_step(run.metrics))
        except KeyboardInterrupt as stop:
            number = stop_code(stop) - 128  # the run takes the signal that this process got: it may save its step
            raise
        finally:
            _stop(child, number)
    if not run.is_finished:
        text = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
        errors = [line for line in text if line.startswith("error: ")]
        raise RunFailed(errors or [*text[-12:], f"exit code {child.returncode}"])


def _stop(child: subprocess.Popen[Any], number: int) -> None:
    """End a run and its children: by a signal, and if that does not help, by SIGKILL."""
    if child.poll() is None and number in deadline.WITHIN_S:
        child.send_signal(number)  # to it alone: what grades its step must not end before it
        with suppress(subprocess.TimeoutExpired):
            child.wait(deadline.WITHIN_S[number] + PATIENCE_S)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole row, 0 if there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**16))
        lines = [line for line in file.read().splitlines(keepends=True)[-2:] if line.endswith(b"\n")]
    try:
        return int(reading.parse(lines[-1])["step"]) if lines else 0
    except (ValueError, TypeError, KeyError):  # a damaged line; the run itself says which
        return 0


def _outcome(run: RunDir) -> str:
    """Say what a run reached."""
    said = held_out.said(run.read_result())
    return "finished" if said is None else "held-out {} {} -> {}".format(*said)
