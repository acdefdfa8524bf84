"""examples/trl_script.py, run as a user runs it, and what its one line changes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant.report.rundir import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_script.py"
OURS = "from rlinvariant import GRPOConfig, GRPOTrainer"
TRLS = "from trl import GRPOConfig, GRPOTrainer"


def test_one_import_changes():
    (line,) = [line for line in EXAMPLE.read_text().splitlines() if "rlinvariant import" in line or "from trl" in line]
    assert line == f"{OURS}  # before: {TRLS}"
    assert "__main__" not in EXAMPLE.read_text()


@pytest.mark.slow
def test_the_script_trains_exactly_in_a_clean_directory(arithmetic_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(EXAMPLE.read_text().replace("trainer.train()", "trainer.train()\ntrainer.save_model('last')"))
    done = subprocess.run([sys.executable, str(script), arithmetic_dir], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    steps = [line for line in lines if "mismatched" in line]
    assert [line.split()[0] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("mismatched 0 / " in line for line in steps)
    assert sum(line.startswith("settings of TRL, set for this run: bf16=False") for line in lines) == 1
    assert (tmp_path / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_script_that_names_its_run_leaves_what_the_command_line_leaves(arithmetic_dir, tmp_path):
    source = EXAMPLE.read_text().replace("    train_dataset=dataset,\n", "    train_dataset=dataset,\n    run='named',\n")
    (tmp_path / "script.py").write_text(source)
    command = [sys.executable, "script.py", arithmetic_dir]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.name for path in (tmp_path / "runs" / "named").iterdir()}
    assert left >= {"config.json", "environment.json", "metrics.jsonl", "result.json", "report.html", "checkpoints", "rollouts"}
    assert len((tmp_path / "runs" / "named" / "metrics.jsonl").read_text().splitlines()) == 4
    (tmp_path / "script.py").write_text(source.replace("run='named'", "run='named', resume=True"))
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and "all 4 steps are done: nothing is trained" in ended.stdout, ended.stderr[-3000:]
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "named")] == [1, 2, 3, 4]
    (tmp_path / "script.py").write_text(source)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode != 0 and "run=named: runs/named exists" in again.stderr


@pytest.mark.slow
def test_a_script_that_is_stopped_says_how_to_go_on(arithmetic_dir, tmp_path):
    """`rlinvariant resume` starts no script: the last line says what to write into it, and result.json too.

    Its exit code is that of a command, by which a batch system tells it from a crash.
    """
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    stop = f"import os, signal\n\ndef stop(**_):\n    {kill}\n    return different_characters(**_)\n\n"
    source = (
        EXAMPLE.read_text().replace("args = GRPOConfig", f"{stop}args = GRPOConfig").replace("=different_characters", "=stop")
    )
    source = source.replace("    train_dataset=dataset,\n", "    train_dataset=dataset,\n    run='named',\n")
    last = 'import atexit\n\natexit.register(print, "the script\'s own last line")\n'
    (tmp_path / "script.py").write_text(last + source)
    command = [sys.executable, "script.py", arithmetic_dir]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    line = "stopped by SIGTERM: step 1 is the last that is saved; go on with: resume=True beside run= in script.py"
    assert done.returncode == 128 + signal.SIGTERM and done.stderr.splitlines()[-1] == line, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and done.stdout.splitlines()[-1] == "the script's own last line"
    assert json.loads((tmp_path / "runs" / "named" / "result.json").read_text())["error"] == line
