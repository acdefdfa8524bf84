"""Real runs that something ends: a signal, their launcher's end, an error of one of two processes. What they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlinvariant.report.rundir import RunDir, read_metrics
from tests.commands import interruptible
from tests.parity.device import cpu_only

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, "-m", "rlinvariant", "train"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
ACCELERATE += ["--config_file", str(ROOT / "configs/cpu.yaml"), str(ROOT / "train.py")]
pytestmark = [pytest.mark.slow, cpu_only("two processes of one run take a GPU each")]


class Run:
    """A run in a directory of its own, which nobody but a signal ends."""

    def __init__(
        self, directory: Path, model: str, command: list[str], *arguments: str, ignored: int = 0, steps: int = 100_000
    ) -> None:
        recipe = f"recipe={ROOT / 'tests/trainer/tiny_recipe.py'}"
        given = [recipe, f"model={model}", "run=x", "wandb.mode=disabled", "trainer.per_device_train_batch_size=6", *arguments]
        self.arguments = [f"steps={steps}", "trainer.num_generations=3", "trainer.lr_scheduler_type=constant", *given]
        self.run, self.directory = RunDir(directory / "runs/x"), directory
        leave_out = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
        self.environment = {k: v for k, v in os.environ.items() if k not in leave_out and not k.startswith("ACCELERATE_")}
        self.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}

        def ignore() -> None:
            if ignored:
                signal.signal(ignored, signal.SIG_IGN)

        with interruptible():
            self.process = subprocess.Popen(
                [*command, *self.arguments], cwd=directory, env=self.environment, preexec_fn=ignore, **pipes
            )

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps are done."""
        while self.process.poll() is None and not (self.run.metrics.exists() and len(self.rows()) >= steps):
            time.sleep(0.1)
        assert self.process.poll() is None, self.process.communicate()[1]

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.run.path)

    def ends(self) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr, when the last process that has these pipes is gone."""
        out, err = self.process.communicate(timeout=600)
        return self.process.returncode, out, err

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.run.result.read_text())

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.glob("checkpoint-*"))


@pytest.fixture
def start(tmp_path, arithmetic_dir):
    """Start a run, which ends with the test."""
    started = []

    def run(*arguments: Any, **options: Any) -> Run:
        started.append(Run(tmp_path, arithmetic_dir, *arguments, **options))
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.communicate()


def alive(group: int) -> list[psutil.Process]:
    """Return the processes of a group, but for those that are dead and not yet buried."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stopped(run: Run, name: str, err: str) -> None:
    """Assert that a run was stopped by a signal after its last step, which is saved, and says so."""
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1)) and run.saved == [f"checkpoint-{steps[-1]}"]
    line = f"stopped by {name}: step {steps[-1]} is the last that is saved; go on with: rlinvariant resume runs/x"
    assert err.splitlines()[-1] == line and "Traceback" not in err
    assert (run.result["finished"], run.result["outcome"], run.result["error"]) == (False, f"stopped by {name}", line)
    assert (run.run.path / "report.html").exists() and not (run.run.path / "lock").exists()


def test_sigterm_saves_the_step_and_the_run_goes_on_from_it(start):
    run = start(TRAIN)
    run.wait_for(2)
    second = subprocess.run([*TRAIN, *run.arguments], cwd=run.directory, env=run.environment, capture_output=True, text=True)
    assert second.returncode == 2 and second.stdout == "", "refused before the engine starts, by the name or by the lock"
    again = [*TRAIN, *run.arguments, "resume=true"]
    second = subprocess.run(again, cwd=run.directory, env=run.environment, capture_output=True, text=True)
    holder = f"process {run.process.pid} on {socket.gethostname()}"
    assert second.returncode == 2 and second.stderr.startswith(f"error: run: {holder}, or one that it started, is at work in")
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.ends()
    assert code == 143
    stopped(run, "SIGTERM", err)
    done = len(run.rows())
    command = [*TRAIN, *run.arguments[1:], f"steps={done + 2}", "resume=true"]
    resumed = subprocess.run(command, cwd=run.directory, env=run.environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in run.rows()] == list(range(1, done + 3)) and run.result["finished"]


def test_under_nohup_a_run_lives_on_until_another_signal_ends_it(start):
    run = start(TRAIN, ignored=signal.SIGHUP)
    run.wait_for(1)
    run.process.send_signal(signal.SIGHUP)
    run.wait_for(len(run.rows()) + 2)
    run.process.send_signal(signal.SIGUSR1)
    code, _, err = run.ends()
    assert code == 138
    stopped(run, "SIGUSR1", err)


def test_ctrl_c_saves_nothing_and_leaves_nothing_behind(start):
    """The control, too: a run that only ends has no checkpoint."""
    run = start(TRAIN)
    run.wait_for(1)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    code, _, err = run.ends()
    line = "interrupted: no step is saved, it begins again at the first; go on with: rlinvariant resume runs/x"
    assert (code, err, run.saved) == (130, f"{line}\n", [])
    assert (run.result["outcome"], run.result["error"]) == ("interrupted", line)
    while left := alive(run.process.pid):  # helpers that end when their pipe does
        for process in left:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                assert process.ppid() == 1
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        pytest.param([*TRAIN, "machine=cpu2"], signal.SIGTERM, 143, id="two processes"),
        pytest.param([*TRAIN, "machine=cpu2"], signal.SIGKILL, -9, id="two processes, whose launcher is killed"),
        pytest.param(ACCELERATE, signal.SIGTERM, -15, id="accelerate"),
        pytest.param(ACCELERATE, signal.SIGKILL, -9, id="accelerate is killed"),
    ],
)
def test_a_run_whose_launcher_ends_saves_its_step_and_ends(command, number, code, start):
    """`ends` returns when every process is gone. Both of two have stopped after the same step: it is saved, and none hangs."""
    run = start(command)
    run.wait_for(2)
    run.process.send_signal(number)
    found, _, err = run.ends()
    assert found == code, err
    stopped(run, "SIGTERM", err)


WORDLESS = "another process of this run has ended without a word, as one does that is killed"
# What the reward's watchdog says, if it is faster than the other rank
DURING = "reward function ends_rank_1, step 2: the trainer ended while this ran: it exited, crashed or was killed"


@pytest.mark.parametrize(
    ("fault", "code", "outcome", "error"),
    [
        ("rank 1 raises", 2, "refused", "rank 1: reward function ends_rank_1, step 2, sample 0: raised ValueError: bad row"),
        (
            "rank 1 is killed",
            137,
            "failed",
            f"another process of this run has ended without a word, as one does that is killed|{DURING}",
        ),
    ],
)
def test_an_error_of_one_process_ends_the_other_and_is_the_result(fault, code, outcome, error, start):
    run = start([*TRAIN, "machine=cpu2"], f"data.fault={fault}")
    found, _, err = run.ends()
    assert found == code and "Traceback" not in err, err
    assert run.result["outcome"] == outcome and run.result["error"].startswith(tuple(error.split("|")))
    assert any(f"error: {line}" in err for line in error.split("|")) and [row["step"] for row in run.rows()] == [1]
    if not run.result["error"].startswith(DURING):  # the watchdog knows of no reward, and makes no report
        assert (run.run.path / "report.html").exists() and run.result["heldout_reward_before"] is not None


def test_log_probs_that_differ_on_one_process_end_both_with_one_line(start):
    run = start([*TRAIN, "machine=cpu2"], "data.fault=rank 1 differs")
    code, _, err = run.ends()
    assert code == 1 and "Traceback" not in err, err
    assert run.result["outcome"] == "not exact" and run.result["error"].startswith("step 2: mismatched ")
    assert err.count("mismatched") == 1 and f"error: {run.result['error']}" in err
    assert [row["step"] for row in run.rows()] == [1, 2] and (run.run.path / "report.html").exists()


def test_a_signal_to_one_of_two_processes_after_its_last_step_ends_both(start):
    """The other would wait for it in the evaluation that follows."""
    run = start([*TRAIN, "machine=cpu2"], "data.fault=rank 1 is stopped at the end", "trainer.save_steps=2", steps=2)
    code, _, err = run.ends()
    assert code == 143, err
    stopped(run, "SIGTERM", err)
