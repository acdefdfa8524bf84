"""Runs of a tiny model, a second or two each, that can be killed, damaged, resumed and compared."""

import json
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests import forks

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests/trainer/tiny_recipe.py"
TIMEOUT_S = 550
Fault = tuple[str, Mapping[str, Any]]
"""Names a function of `faults.py`, with its arguments."""


@dataclass
class Run:
    """Stands for a process that runs a command of `rlinvariant`."""

    pid: int
    log: Path
    lab: "Lab"

    def wait(self, seconds: float = TIMEOUT_S) -> int | None:
        """Return the exit code, minus the signal's number where one has ended it; None: it ran longer, and was killed."""
        code = self.lab.wait(self.pid, seconds)
        if code is None:
            self.kill()
            self.lab.wait(self.pid, TIMEOUT_S)
        return code

    def kill(self) -> None:
        """End the run's processes."""
        for kill in (os.killpg, os.kill):  # it may not have made its group yet
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        """Return what the run has printed."""
        return self.log.read_text(errors="replace")


class Lab:
    """A directory with a fork server that works in it; see `server.py`.

    Args:
        directory: where runs/ and logs/ are made.
        model: directory of a checkpoint.
    """

    def __init__(self, directory: Path, model: str) -> None:
        self.directory, self.model, self._count = directory, model, 0
        self.runs, self.logs = directory / "runs", directory / "logs"
        self.logs.mkdir(parents=True)
        self._codes: dict[int, int] = {}
        self._pending = b""
        (requests, self._requests), (self._answers, answers) = os.pipe(), os.pipe()
        with (self.logs / "server").open("wb") as errors:
            self._server = forks.Fork(
                ["-m", "tests.reliability.server", model],
                cwd=directory,
                env=environment(),
                stdin=requests,
                stdout=answers,
                stderr=errors.fileno(),
            )
        for taken in (requests, answers):
            os.close(taken)
        if self._line(TIMEOUT_S) != "ready":
            raise RuntimeError(f"the fork server did not start: {(self.logs / 'server').read_text()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._requests)
        self._server.wait(TIMEOUT_S)
        os.close(self._answers)

    def start(self, *settings: str, run: str, faults: Sequence[Fault] = (), **variables: str) -> Run:
        """Start `train` with the tiny recipe; a setting that is given twice has its last value."""
        return self.command("train", *self.arguments(run, settings), faults=faults, **variables)

    def arguments(self, run: str, settings: Sequence[str]) -> list[str]:
        """Return what `rlinvariant train` is given for a run of the tiny recipe."""
        given = {"recipe": str(RECIPE), "model": self.model, "run": run, "wandb.mode": "disabled"}
        given |= dict(setting.split("=", 1) for setting in settings)
        return [f"{key}={value}" for key, value in given.items()]

    def command(self, *argv: str, faults: Sequence[Fault] = (), **variables: str) -> Run:
        """Start any command of `rlinvariant`."""
        self._count += 1
        log = self.logs / str(self._count)
        request = {"argv": argv, "log": str(log), "environment": variables, "faults": faults}
        with os.fdopen(self._requests, "wb", closefd=False) as requests:
            requests.write(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._line(TIMEOUT_S))
            if "started" in answer:
                return Run(answer["started"], log, self)
            self._codes[answer["ended"]] = answer["code"]

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return a run's exit code, or None if it has none after so long."""
        end = time.monotonic() + seconds
        while pid not in self._codes and (left := end - time.monotonic()) > 0:
            if line := self._line(left):
                answer = json.loads(line)
                self._codes[answer["ended"]] = answer["code"]
        return self._codes.get(pid)

    def _line(self, seconds: float) -> str:
        """Return the server's next line, or "" if there is none in that time.

        Raises:
            RuntimeError: the server has ended.
        """
        end = time.monotonic() + seconds
        while b"\n" not in self._pending:
            if not select.select([self._answers], [], [], max(0, end - time.monotonic()))[0]:
                return ""
            if not (data := os.read(self._answers, 65536)):
                raise RuntimeError(f"the fork server has ended: {(self.logs / 'server').read_text()[-3000:]}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()


def environment() -> dict[str, str]:
    """Return the environment of a run: one thread, no network, nothing of a launcher."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "VLLM_", "RANK", "WORLD", "LOCAL_"))
    }
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return ours | fixed | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
