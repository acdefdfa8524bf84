"""Run an ablation's runs one after the other, each in a process of its own, and go on where an earlier command ended."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlinvariant.ablate.arms import Arm
from rlinvariant.ablate.plan import Plan
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir
from rlinvariant.text import percent

STOP_SIGNALS = ((signal.SIGINT, 20), (signal.SIGTERM, 5), (signal.SIGKILL, None))
"""The signals that end a run, in order, and how many seconds each is waited for before the next is sent."""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end the run that is going on as ctrl-C does.

    SIGINT is set too: where it was ignored, as in a script's background, a run would inherit that and could not be stopped.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(plan: Plan, left: Sequence[tuple[Arm, int]], steps: int, console: Console, lock: int) -> list[str]:
    """Run one after the other, and return the names of those that failed; if the very first fails, no other is started."""
    failed: list[str] = []
    began = time.monotonic()
    with _terminated_as_interrupted():
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
    config = json.loads(run.config.read_text())
    checkpoints = {int(p.name.partition("-")[2]): p for p in run.checkpoints.glob("checkpoint-*")}
    for step in [step for step, p in checkpoints.items() if not (p / "trainer_state.json").exists()]:  # written last
        torn = checkpoints.pop(step)
        torn.rename(torn.with_name(f"torn-{torn.name}"))
    reached = max(checkpoints, default=0)
    if 0 < reached < steps and not config.get("staleness", {}).get("value"):
        return True, f"was interrupted; goes on from its checkpoint of step {reached}"
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
    module = ["-m", "rlinvariant.cli", "train", *arguments]
    if plan.launch is None:
        return [sys.executable, *module]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--config_file", plan.launch, *module]


def _run(command: Sequence[str], run: RunDir, advance: Any, lock: int) -> None:
    """Start a run and wait for it, with its output in log.txt. Raises RunFailed if it leaves no result."""
    log = run.path / "log.txt"
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        # In a session of its own, so that ctrl-C reaches it once, from here
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock]
        )
        try:
            while True:
                try:
                    child.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    advance(_last_step(run.metrics))
        finally:
            _stop(child)
    if not run.is_finished:
        text = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
        errors = [line for line in text if line.startswith("error: ")]
        raise RunFailed(errors or [*text[-12:], f"exit code {child.returncode}"])


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a run and its children: first as ctrl-C does, then with more force."""
    for number, patience in STOP_SIGNALS:
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole row, 0 if there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**16))
        lines = [line for line in file.read().splitlines(keepends=True)[-2:] if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def _outcome(run: RunDir) -> str:
    """Say what a run reached."""
    result = json.loads(run.result.read_text())
    before, after = (result.get(f"accuracy_{when}") for when in ("before", "after"))
    return "finished" if after is None or before is None else f"accuracy {percent(before)} -> {percent(after)}"
