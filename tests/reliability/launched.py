"""Runs by the documented commands, in processes of their own: what a fork is compared with, and two processes at once."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.reliability.lab import ROOT, Lab, environment

TIMEOUT_S = 900
CONFIGS = ROOT / "configs"


def start(lab: Lab, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of `rlinvariant` in the lab's directory, in a process group of its own."""
    command = [sys.executable, "-m", "rlinvariant", *arguments]
    with (lab.logs / f"launched {time.monotonic_ns()}").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=lab.directory,
            env=environment(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def train(lab: Lab, name: str, settings: Sequence[str], machine: str) -> subprocess.Popen[bytes]:
    """Start a run of the tiny recipe, as `Lab.start` does."""
    return start(lab, "train", *lab.arguments(name, [*settings, f"machine={CONFIGS / machine}.yaml"]))


def kill_after_rows(process: subprocess.Popen[bytes], run_dir: Path, rows: int) -> None:
    """End a run's processes by SIGKILL when it has written so many rows."""
    end = time.monotonic() + TIMEOUT_S
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
        assert process.poll() is None, f"the run has ended before row {rows}"
        assert time.monotonic() < end, f"no row {rows} in time"
        time.sleep(0.05)
    main = psutil.Process(process.pid)
    everyone = [*main.children(recursive=True), main]
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    for one in everyone:  # the last one that is there holds the lock
        with suppress(psutil.NoSuchProcess):
            while one.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
