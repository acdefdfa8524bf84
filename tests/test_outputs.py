"""Every path that a command writes to is tried before its work begins: a bad one is refused in one line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.bench import __main__ as bench
from rlinvariant.errors import UserError
from rlinvariant.files import require_writable, write_atomically
from rlinvariant.models.families import FAMILIES
from tests import commands
from tests.report.runs import write_run


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, in which `a-file` is a file and `a-directory` a directory."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("a-directory").mkdir()


BAD_FILES = {
    "a-directory": "it is a directory",
    "a-file/x.json": "Not a directory",
    "a-file/deep/x.json": "Not a directory",
    "/proc/x.json": "No such file|Permission denied|Operation not permitted",
}
BAD_DIRECTORIES = {"a-file": "it is a file", "a-file/x": "Not a directory", "/proc/x": "No such file|Permission|not permitted"}


@pytest.mark.parametrize(("path", "why"), BAD_FILES.items())
def test_a_file_that_cannot_be_written_is_refused(path, why):
    with pytest.raises(UserError, match=f"^page: {path} cannot be written .*({why}).*; fix$"):
        require_writable(Path(path), "page", "fix")


@pytest.mark.parametrize(("path", "why"), BAD_DIRECTORIES.items())
def test_a_directory_that_cannot_be_filled_is_refused(path, why):
    with pytest.raises(UserError, match=f"^run: {path} cannot be written .*({why}).*; fix$"):
        require_writable(Path(path), "run", "fix", directory=True)


def test_what_can_be_written_is_not_touched():
    for path in ("a-file", "new", "a-directory/new", "not/yet/there"):
        require_writable(Path(path), "page", "fix")
    for path in ("a-directory", "new", "not/yet/there"):
        require_writable(Path(path), "run", "fix", directory=True)
    assert sorted(x.name for x in Path().rglob("*")) == ["a-directory", "a-file"]


WRITE = "from pathlib import Path; from rlinvariant import files; files.write_atomically(Path('x'), 'other', shared=True)"


def test_a_file_that_two_processes_write_at_once_is_the_last_one_s(monkeypatch):
    """Another process writes it while this one is in the middle."""
    sync, others = os.fsync, []

    def interrupted(file: int) -> None:
        if not others:
            others.append(subprocess.run([sys.executable, "-c", WRITE], check=True))
            assert Path("x").read_text() == "other"
        sync(file)

    monkeypatch.setattr(os, "fsync", interrupted)
    write_atomically(Path("x"), "own", shared=True)
    assert Path("x").read_text() == "own" and others
    assert sorted(x.name for x in Path().iterdir()) == ["a-directory", "a-file", "x"]


def fails(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work has begun")


def a_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a model that no command may load."""
    FAMILIES["qwen3"]().save_pretrained("model")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fails)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    return "model"


def a_run() -> Path:
    write_run(Path("runs/it"), 0, steps=2)
    return Path("runs/it")


def verify_out(monkeypatch):
    commands.run("verify", a_model(monkeypatch), "--random", "--out", "a-directory")


def verify_cache(monkeypatch):
    monkeypatch.setenv("RLINVARIANT_CACHE", "a-file")
    commands.run("verify", a_model(monkeypatch), "--random")


def demo(monkeypatch):
    Path("runs").mkdir()
    Path("runs/it").touch()
    commands.run("demo", a_model(monkeypatch), "run=it")


def ablate(monkeypatch):
    Path("runs").touch()
    monkeypatch.setattr("rlinvariant.ablate.runs.run_all", fails)
    commands.run("ablate", "recipe=arithmetic")


def train(monkeypatch):
    Path("runs").mkdir()
    Path("runs/it").touch()
    monkeypatch.setattr("rlinvariant.train.launch", fails)
    commands.run("train", "recipe=arithmetic", "run=it")


def report(monkeypatch):
    (a_run() / "report.html").mkdir()
    monkeypatch.setattr("rlinvariant.report.html.page", fails)
    commands.run("report", "runs/it")


def push(monkeypatch):
    (a_run() / "dashboard").touch()
    monkeypatch.setattr("rlinvariant.report.dashboard.report", fails)
    commands.run("dashboard", "push", "runs/it")


def sync(monkeypatch):
    (a_run() / "tensorboard").touch()
    monkeypatch.setattr("rlinvariant.report.wandb_log.login", fails)
    commands.run("dashboard", "sync", "runs/it")


COMMANDS = [verify_out, verify_cache, demo, ablate, train, report, push, sync]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda x: x.__name__)
def test_a_command_refuses_a_bad_path_before_its_work_begins(command: Callable[..., None], monkeypatch):
    with pytest.raises(UserError, match="cannot be written") as refused:
        command(monkeypatch)
    assert "\n" not in str(refused.value)


def test_a_benchmark_refuses_a_bad_path_before_it_measures(monkeypatch, capsys):
    monkeypatch.setattr("rlinvariant.bench.ops.rows", fails)
    for arguments in (["ops", "--out", "a-file"], ["report", "a-directory"]):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert "cannot be written" in capsys.readouterr().err
