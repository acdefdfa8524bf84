"""A directory has one holder: told apart from the dead, from a child that outlives it, and from a file system without locks."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant import cli, lock
from rlinvariant.errors import UserError
from rlinvariant.lock import locked

HOLD = """
import sys
from pathlib import Path
from rlinvariant.lock import locked
with locked(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    input()
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def has_flock(request, monkeypatch) -> bool:
    """Let `flock` of this process fail as on a file system without locks. What it starts uses the real one."""
    if not request.param:

        def fails(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", fails)
    return request.param


def test_a_second_holder_is_told_who_the_first_is(tmp_path, has_flock):
    process = holder(tmp_path)
    who = (
        f"^run: process {process.pid} on {socket.gethostname()}, or one that it started, is at work in {tmp_path}; wait for it"
    )
    with pytest.raises(UserError, match=who) as error, locked(tmp_path, "run"):
        pass
    assert ("remove" in str(error.value)) is not has_flock and "\n" not in str(error.value)
    process.communicate("\n")
    with locked(tmp_path, "run"):
        assert (tmp_path / "lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path, has_flock):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").read_text().endswith(f" {process.pid}\n"), "it could not remove it"
    with locked(tmp_path, "run"):
        pass
    process.communicate()


def test_without_flock_another_host_is_believed_to_live(tmp_path, has_flock):
    (tmp_path / "lock").write_text("elsewhere 1\n")
    if has_flock:  # the kernel knows better
        with locked(tmp_path, "run"):
            return
    fix = f"process 1 on elsewhere, .*; if it is not, remove {tmp_path}/lock$"
    with pytest.raises(UserError, match=fix), locked(tmp_path, "run"):
        pass


def test_a_child_that_outlives_the_holder_keeps_the_lock(tmp_path):
    with locked(tmp_path, "run") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(UserError, match="is at work in"), locked(tmp_path, "run"):
        pass
    child.communicate(b"\n")
    with locked(tmp_path, "run"):
        pass


def test_nobody_holds_a_file_that_was_removed(tmp_path):
    """A process that opened the file before its holder removed it must not hold what nobody else can find."""
    opened = os.open

    def slow(path, *arguments):
        file = opened(path, *arguments)
        if arguments[0] & os.O_CREAT == 0 and (tmp_path / "lock").exists() and first.poll() is None:
            first.communicate("\n")  # it ends, and removes the file that we have just opened
        return file

    first = holder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", slow)
        with locked(tmp_path, "run") as file:
            assert os.path.samestat(os.fstat(file), os.stat(tmp_path / "lock"))


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^run: .*/file/x cannot be written"), locked(tmp_path / "file/x", "run"):
        pass


def test_a_second_run_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlinvariant.run.plan", lambda config: pytest.fail("it went on"))
    first = holder(tmp_path / "runs/x")
    assert cli.main(["train", "recipe=arithmetic", "run=x"], script="train.py") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: run: process {first.pid} on {socket.gethostname()}, or") and shown.err.count("\n") == 1
    first.communicate("\n")
    assert list((tmp_path / "runs/x").iterdir()) == []


@pytest.mark.parametrize("has_flock", [False], indirect=True)
def test_one_process_takes_over_what_the_dead_have_left(tmp_path, has_flock, monkeypatch):
    """The other comes between the first one's look at the dead holder and its own name in the file."""
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    is_dead, others = lock._is_dead, []

    def interrupted(holder: list[str]) -> bool:
        dead = is_dead(holder)
        if not others:
            others.append(locked(tmp_path, "run"))
            others[0].__enter__()
        return dead

    monkeypatch.setattr(lock, "_is_dead", interrupted)
    with pytest.raises(UserError, match=f"^run: process {os.getpid()} on .* is at work in"), locked(tmp_path, "run"):
        pass
    others[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []
