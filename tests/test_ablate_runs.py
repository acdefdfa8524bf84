"""`rlinvariant ablate`: what becomes of its runs, and one small ablation of real ones."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlinvariant import cli
from rlinvariant.ablate import check, results, runs
from rlinvariant.ablate.arms import stale
from rlinvariant.ablate.plan import Plan
from rlinvariant.errors import UserError
from rlinvariant.launch import LAUNCHER
from rlinvariant.lock import locked
from rlinvariant.report.rundir import read_metrics
from tests import commands, forks
from tests.parity.device import CUDA

TINY = f"recipe={Path(__file__).parent / 'trainer/tiny_recipe.py'}"
SMALL = ["recipe=arithmetic", "seeds=2", "arms=exact,drift", "steps=3", "run=x"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch):
    """Replace runs by a few lines of Python that get the run directory: only what becomes of them is tested."""

    def use(code: str) -> None:
        def command(wanted: Plan, arguments: list[str]) -> list[str]:
            run = next(a for a in arguments if a.startswith("run=")).removeprefix("run=")
            return [sys.executable, "-c", f"import os, sys; from pathlib import Path; run = Path('runs/{run}')\n{code}"]

        monkeypatch.setattr(runs, "_command", command)

    return use


RESULT = '{"finished": true, "heldout_reward_before": 0.5, "heldout_reward_after": 0.75, "heldout_is_accuracy": true}'
FINISH = f"""(run / "result.json").write_text('{RESULT}')"""


def test_a_run_that_fails_is_quoted_and_the_others_go_on(fake, capsys, monkeypatch):
    monkeypatch.setattr(results, "report", lambda path, console: console.print(f"report of {path}"))
    fake(f"print('\\x1b[31mwords')\nif 'drift/seed-0' in str(run): sys.exit('error: out of \\x1b[1mluck')\n{FINISH}")
    assert commands.run("ablate", *SMALL) == 1
    out = capsys.readouterr().out
    assert "[2/4] drift, seed 0: failed after" in out and "[4/4] drift, seed 1: done in" in out and "min left" in out
    assert "drift/seed-0 failed; runs/ablation-x/drift/seed-0/log.txt ends with\n    error: out of \\x1b[1mluck\n" in out
    assert "failed: drift/seed-0; the same command tries them again" in out and "report of runs/ablation-x" in out
    assert "\x1b" not in out and "held-out accuracy 50.0 % -> 75.0 %" in out
    assert "\x1b[31mwords" in Path("runs/ablation-x/exact/seed-0/log.txt").read_text()
    fake(FINISH)
    assert commands.run("ablate", *SMALL) == 0
    out = capsys.readouterr().out
    assert "3 of 4 runs done before" in out and "[1/1] drift, seed 0: done in" in out and "exact, seed" not in out


def test_runs_at_once_have_a_gpu_each_in_turn(fake, capsys, monkeypatch):
    """Every run waits here until all others have started: one after the other they would not end."""
    monkeypatch.setattr(results, "report", lambda path, console: None)
    for module in (runs, check):
        monkeypatch.setattr(module, "visible_gpus", lambda: ["5", "3"])
    fake(
        "import time\n"
        "(run / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len([*Path('runs/ablation-x').glob('*/*/gpu')]) < 4: time.sleep(0.05)\n"
        f"if 'drift/seed-0' in str(run): sys.exit('error: out of luck')\n{FINISH}"
    )
    together = "at_once=4", "trainer.tokens_per_microbatch=4096"
    assert commands.run("ablate", *SMALL, *together) == 1
    out = capsys.readouterr().out
    assert "at once: exact, seed 0; drift, seed 0; exact, seed 1; drift, seed 1\n" in out
    assert "[1 to 4/4] 4 runs at once: failed after" in out and "failed: drift/seed-0; the same" in out
    assert "  drift/seed-1: held-out accuracy 50.0 % -> 75.0 %\n" in out and "not started" not in out
    gpus = [(Path("runs/ablation-x") / run / "gpu").read_text() for run in ("exact/seed-0", "drift/seed-0", "exact/seed-1")]
    assert gpus == ["5", "3", "5"]


def test_if_the_first_run_fails_no_other_starts(fake, capsys):
    fake("print('Traceback'); sys.exit(3)")
    assert commands.run("ablate", *SMALL) == 1
    out = capsys.readouterr().out
    assert "    Traceback\n    exit code 3\nthe first run failed, as the others would: they are not started" in out
    assert "failed: exact/seed-0; the same" in out and not Path("runs/ablation-x/drift").exists()


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_stops_the_runs_and_says_how_to_go_on(number, inherited, at_once, fake, capsys, monkeypatch):
    """Each run gets the signal, also where SIGINT was ignored, as in a script's background: it must not inherit that."""
    before, terminate = signal.signal(signal.SIGINT, inherited), signal.getsignal(signal.SIGTERM)
    os.mkfifo("started")
    fake(
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        "    Path('started').write_text(f'{os.getpid()} ')\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    (run / 'interrupted').touch()"
    )
    monkeypatch.setattr(runs, "PATIENCE_S", 600)  # as long as a machine may take
    for module in (runs, check):
        monkeypatch.setattr(module, "visible_gpus", lambda: ["0", "1"])
    pids: list[int] = []

    def interrupt() -> None:
        while len(pids) < at_once:  # a pipe: this waits until a run writes
            pids.extend(map(int, Path("started").read_text().split()))
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert commands.run("ablate", *SMALL, f"at_once={at_once}") == 128 + number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (inherited, terminate)
    finally:
        signal.signal(signal.SIGINT, before)
    got = [path.parts[2] for path in sorted(Path("runs/ablation-x").glob("*/seed-0/interrupted"))]
    assert got == (["exact"] if at_once == 1 else ["drift", "exact"]), "a run did not get the signal"
    out = capsys.readouterr().out
    command = "rlinvariant ablate recipe=arithmetic seeds=0,1 arms=exact,drift run=x steps=3"
    command += " at_once=2" if at_once == 2 else ""
    title = "[1/4] exact, seed 0" if at_once == 1 else "[1 to 2/4] 2 runs at once"
    assert f"{title}: stopped after" in out
    assert f"stopped: 0 of 4 runs are done and kept; go on with\n  {command}\n" in out
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_runs_at_once_that_the_first_has_not_ended(number, fake, capsys, monkeypatch):
    os.mkfifo("heard")
    fake(
        "import signal\n"
        "heard = lambda *_: Path('heard').write_text(f'{os.getpid()} ')\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, heard)\n"
        "heard()\n"
        "while True: signal.pause()"
    )
    monkeypatch.setattr(runs, "PATIENCE_S", 600)
    pids: list[int] = []

    def interrupt_twice() -> None:
        for _ in range(2):
            pids.append(int(Path("heard").read_text()))  # at its start, and of the first signal
            os.kill(os.getpid(), number)

    threading.Thread(target=interrupt_twice, daemon=True).start()
    assert commands.run("ablate", *SMALL) == 128 + number
    assert "stopped: 0 of 4 runs are done and kept; go on with\n" in capsys.readouterr().out
    assert len(pids) == 2 and pids[0] == pids[1]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_two_ablations_in_one_directory_are_refused(fake):
    with locked(Path("runs/ablation-x"), "run"), pytest.raises(UserError, match="is at work in runs/ablation-x; wait for it"):
        commands.run("ablate", *SMALL)


# ---- real runs


class ForkedRun(forks.Fork):
    """Takes the place of `subprocess.Popen`: a run of an ablation as a fork, as which it neither imports nor is launched."""

    def __init__(self, command: list[str], *, pass_fds: list[int], env: dict[str, str], **streams: Any) -> None:
        assert command[0] == sys.executable and streams.pop("start_new_session")
        with open(os.devnull) as null:
            stream = {subprocess.DEVNULL: null, subprocess.STDOUT: streams["stdout"]}
            opened = {name: stream.get(given, given).fileno() for name, given in streams.items()}
            super().__init__(command[1:], cwd=Path.cwd(), env=env | forks.LAUNCHED | {LAUNCHER: ""}, kept=pass_fds, **opened)


@pytest.fixture(
    scope="module",
    params=[
        "forks",
        pytest.param("processes", marks=pytest.mark.slow),
    ],
)
def small(request, arithmetic_dir, tmp_path_factory) -> tuple[Path, list[str]]:
    """Run two arms with one seed for two steps, and the same command again. Gives the directory and what each printed."""
    directory, printed = tmp_path_factory.mktemp("ablation"), []
    argv = [TINY, f"model={arithmetic_dir}", "seeds=1", "arms=exact,stale-1", "steps=2", "wandb.mode=disabled"]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "forks" and not CUDA:
            patch.setattr(runs.subprocess, "Popen", ForkedRun)
        for _ in range(2):
            output = io.StringIO()
            with contextlib.chdir(directory), contextlib.redirect_stdout(output):
                code = cli.main(["ablate", *argv])
            assert code == 0, output.getvalue()
            printed.append(output.getvalue())
    return directory / "runs/ablation-tiny_recipe", printed


def test_a_small_ablation_leaves_its_files_and_prints_its_table(small):
    path, (first, second) = small
    spec = json.loads((path / "ablation.json").read_text())
    assert spec["arms"][1]["overrides"] == list(stale(1).overrides) and (spec["steps"], spec["seeds"]) == (2, [0])
    rows = {name: read_metrics(path / name / "seed-0") for name in ("exact", "stale-1")}
    clocks = ("time/", "perf/", "step_time", "profiling/")
    begin = [{k: repr(v) for k, v in r[0].items() if not k.startswith(clocks)} for r in rows.values()]
    assert begin[0] == begin[1], "at the first step the arms have the same data and weights, and no lag yet"
    assert [row["onpolicy/weight_version_lag"] for row in rows["stale-1"]] == [0, 1]
    mismatched = {name: [row["onpolicy/mismatched_tokens"] > 0 for row in r] for name, r in rows.items()}
    assert mismatched == {"exact": [False, False], "stale-1": [False, True]}
    for name in rows:
        result: dict[str, Any] = json.loads((path / name / "seed-0/result.json").read_text())
        assert result["finished"] is True and 0 <= result["heldout_reward_after"] <= 1 and result["seconds"] > 0
        assert "mismatched" in (path / name / "seed-0/log.txt").read_text()
    assert "staleness=1" in (path / "stale-1/seed-0/log.txt").read_text()
    compared = sum(row["onpolicy/compared_tokens"] for row in rows["exact"])
    assert f"0 / {compared:,}" in first and "[2/2] stale-1, seed 0: done in" in first
    summary = json.loads((path / "summary.json").read_text())
    assert summary["arms"]["exact"]["tokens"] == {"mismatched": 0, "compared": compared}
    assert "one seed: no interval" in first and (path / "report.html").stat().st_size > 10_000


def test_the_same_command_again_runs_nothing_and_reports(small):
    _, (first, second) = small
    head, *rest = second.splitlines()
    assert head.endswith("2 of 2 runs done before") and "seed 0: done" not in second
    assert rest == first.splitlines()[-len(rest) :]
