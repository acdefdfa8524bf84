"""Run an ablation's runs, each in a process of its own, some at once, and go on where an earlier command ended."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
    """Run as many at once as the plan says, and return the names of those that failed.

    The next ones start when all of these have ended. If all of the very first fail, no others are started.
    """
    failed: list[str] = []
    began = time.monotonic()
    # SIGINT also where it was ignored, as in a script's background: a run would inherit that and could not be stopped
    with stopping.handled(stopping.raise_stopped, also_ignored=(signal.SIGINT,)):
        for first in range(0, len(left), plan.at_once):
            jobs = left[first : first + plan.at_once]
            done = first + len(jobs)
            which = "; ".join(f"{arm.name}, seed {seed}" for arm, seed in jobs)
            title = f"[{done}/{len(left)}] {which}"
            if len(jobs) > 1:  # all their names would be longer than a terminal's line, in which a bar stands, too
                title = f"[{first + 1} to {done}/{len(left)}] {len(jobs)} runs at once"
                console.print(f"at once: {which}")
            commands, names = dict[RunDir, list[str]](), dict[RunDir, str]()
            for arm, seed in jobs:
                run, name = plan.run_dir(arm, seed), f"{arm.name}/seed-{seed}"
                resume, note = prepare(run, steps)
                if note:
                    console.print(f"{name}: {note}")
                commands[run], names[run] = _command(plan, plan.arguments(arm, seed, resume)), name
            wrong: dict[RunDir, list[str]] = {}
            try:
                with console.stage(title, steps * len(jobs)) as advance:
                    _run(commands, advance, lock)
            except RunsFailed as error:
                wrong = error.lines
            for run, name in names.items():
                if run in wrong:
                    console.print(f"  {name} failed; {run.path / 'log.txt'} ends with")
                    for line in wrong[run]:
                        console.print(f"    {line}")
                    failed.append(name)
            if len(wrong) == len(jobs) == done < len(left):
                which = "the first run" if done == 1 else f"the first {done} runs"
                console.print(f"{which} failed, as the others would: they are not started")
                return failed
            seconds = (time.monotonic() - began) / done * (len(left) - done)
            remaining = f"; about {max(1, round(seconds / 60))} min left" if seconds else ""
            good = [run for run in names if run not in wrong]
            for run in good:
                name = "" if len(jobs) == 1 else f"{names[run]}: "
                console.print(f"  {name}{_outcome(run)}{remaining if run == good[-1] else ''}")
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


class RunsFailed(Exception):
    """Tells that runs ended without a result; `lines` are the end of the output of each."""

    def __init__(self, lines: dict[RunDir, list[str]]) -> None:
        super().__init__(*lines)
        self.lines = lines


def _command(plan: Plan, arguments: Sequence[str]) -> list[str]:
    """Return the command line of one run."""
    machine = [] if plan.launch is None else [f"machine={plan.launch}"]
    return [sys.executable, "-m", "rlinvariant.cli", "train", *machine, *arguments]


def _run(commands: Mapping[RunDir, Sequence[str]], advance: Any, lock: int) -> None:
    """Start runs, spread over the GPUs, and wait for all, with their output in log.txt.

    Raises:
        RunsFailed: one or more have left no result.
    """
    gpus = visible_gpus() if len(commands) > 1 else []
    starts: dict[RunDir, int] = {}
    children: dict[RunDir, subprocess.Popen[Any]] = {}
    number = signal.SIGKILL
    try:
        for at, (run, command) in enumerate(commands.items()):
            own = {LAUNCHER: str(os.getpid())}  # which the run ends with
            own |= {"CUDA_VISIBLE_DEVICES": gpus[at % len(gpus)]} if gpus else {}
            with (run.path / "log.txt").open("ab") as file:
                file.write(f"$ {shlex.join(masked_arguments(command))}\n".encode())
                file.flush()
                starts[run] = file.tell()
                # In a session of its own, so that ctrl-C reaches it once, from here
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
                options: dict[str, Any] = {"start_new_session": True, "pass_fds": [lock], "env": os.environ | own}
                children[run] = subprocess.Popen(command, **pipes, **options)
        while alive := [child for child in children.values() if child.poll() is None]:
            with suppress(subprocess.TimeoutExpired):
                alive[0].wait(1)
            advance(sum(_last_step(run.metrics) for run in commands))
    except KeyboardInterrupt as stop:
        number = stop_code(stop) - 128  # the runs take the signal that this process got: they may save their step
        raise
    finally:
        _stop(list(children.values()), number)
    if wrong := {run: _end(run, starts[run], child) for run, child in children.items() if not run.is_finished}:
        raise RunsFailed(wrong)


def _end(run: RunDir, start: int, child: subprocess.Popen[Any]) -> list[str]:
    """Return the error lines of a run's output, which begins at `start` of log.txt, or its last lines."""
    text = (run.path / "log.txt").read_bytes()[start:].decode("utf-8", "replace").splitlines()
    return [line for line in text if line.startswith("error: ")] or [*text[-12:], f"exit code {child.returncode}"]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    said = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return said[: torch.cuda.device_count()] or [str(number) for number in range(torch.cuda.device_count())]


def _stop(children: Sequence[subprocess.Popen[Any]], number: int) -> None:
    """End runs and their children: by a signal, and where that does not help, or another one comes, by SIGKILL."""
    alive = [child for child in children if child.poll() is None]
    try:
        if number in deadline.WITHIN_S:
            for child in alive:
                child.send_signal(number)  # to it alone: what grades its step must not end before it
            end = time.monotonic() + deadline.WITHIN_S[number] + PATIENCE_S
            for child in alive:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, end - time.monotonic()))
    finally:
        for child in alive:
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
