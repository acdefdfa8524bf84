"""A process that has imported torch, vLLM and TRL, which is most of a start, and forks what `python ARGUMENTS` would start.

All tests of a session share one: pytest's first process starts it, and it imports when it is asked for the first time. A fork
has its own session, directory, environment and random state; its OpenMP threads are as many as OMP_NUM_THREADS says there.
What only an import reads from the environment it does not see, and neither launcher nor exit handlers run: what a test says of
these is said of a process that is started as a user starts it.

    python -m tests.forks DESCRIPTOR    serves at a socket that listens, until stdin is closed
"""

import importlib
import json
import os
import random
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.collector import importing

ROOT = Path(__file__).parents[1]
VARIABLE = "RLINVARIANT_TEST_FORKS"  # holds the socket's path
MODULES = (
    "datasets",
    "rlinvariant.run",
    "rlinvariant.report.html",
    "rlinvariant.report.rollouts",
    "rlinvariant.report.wandb_log",
    "rlinvariant.trainer.evaluate",
    "rlinvariant.trainer.ppo",
    "rlinvariant.trainer.refusals",
    "rlinvariant.verification.start",
    "wandb",
)
REQUEST_BYTES = 1 << 20
TIMEOUT_S = 550.0  # ends a test that hangs, a little before pytest does; no machine is too slow for it
LAUNCHED = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
"""The environment of a process that `accelerate launch` starts on a CPU, with one thread."""


# ---- what a test calls


class Fork:
    """Stands for a process that is a fork of the server: `python ARGUMENTS`, where ARGUMENTS are a file's or begin with -m.

    Args:
        arguments: what follows `python` on a command line.
        cwd: its directory.
        env: its whole environment.
        stdin, stdout, stderr: descriptors that it has as 0, 1 and 2.
        kept: further descriptors that it holds until it ends.
    """

    returncode: int | None = None

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path | str,
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        kept: Sequence[int] = (),
    ) -> None:
        self.args = [sys.executable, *arguments]
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(os.environ[VARIABLE])
        request = {"arguments": list(arguments), "directory": str(cwd), "environment": dict(env)}
        socket.send_fds(self._server, [json.dumps(request).encode()], [stdin, stdout, stderr, *kept])
        self.pid = self._told()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, minus the signal's number where one has ended it.

        Raises:
            subprocess.TimeoutExpired: it runs longer.
        """
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._told()
            self._server.close()
        return self.returncode

    def _told(self) -> int:
        """Return the number that the server tells next. Raises RuntimeError where it has ended."""
        if not (number := self._server.recv(64)):
            raise RuntimeError("the process that forks the tests' processes has ended; was memory short?")
        return int(number)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and its children."""
        if self.poll() is None:
            for kill in (os.killpg, os.kill):  # it may not have made its group yet
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
            self.wait()


def run(
    arguments: Sequence[str], *, cwd: Path | str, env: Mapping[str, str], timeout: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Fork a process, wait for it, and return its exit code and what it has printed, as `subprocess.run` does."""
    (done,) = _run([arguments], cwd, [env], timeout)
    return done


def run_ranks(
    count: int, arguments: Sequence[str], *, cwd: Path | str, env: Mapping[str, str] = os.environ, timeout: float = TIMEOUT_S
) -> list[subprocess.CompletedProcess[str]]:
    """Fork the processes of one run, as `accelerate launch` with a file of so many processes on a CPU starts them.

    Returns:
        For each rank what `run` does.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as the launcher has one
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": str(count)}
    each = [dict(env) | LAUNCHED | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run([arguments] * count, cwd, each, timeout)


def _run(
    commands: Sequence[Sequence[str]], cwd: Path | str, environments: Sequence[Mapping[str, str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Fork processes that run together, and return what `run` does for each."""
    with ExitStack() as stack:
        null = stack.enter_context(open(os.devnull))
        started: list[tuple[Fork | subprocess.Popen[bytes], IO[str], IO[str]]] = []
        for arguments, env in zip(commands, environments, strict=True):
            output, error = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = start(arguments, cwd, env, null, output, error)
            stack.callback(process.kill)
            started.append((process, output, error))
        done = []
        for process, output, error in started:
            code = process.wait(timeout)
            done.append(subprocess.CompletedProcess(process.args, code, *(_text(file) for file in (output, error))))
        return done


def start(
    arguments: Sequence[str], cwd: Path | str, env: Mapping[str, str], stdin: IO[str], stdout: IO[str], stderr: IO[str]
) -> Fork | subprocess.Popen[bytes]:
    """Fork a process; with a GPU, whose driver does not survive a fork, start it."""
    import torch

    streams = {"stdin": stdin.fileno(), "stdout": stdout.fileno(), "stderr": stderr.fileno()}
    if torch.cuda.is_available():
        return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, **streams)
    return Fork(arguments, cwd=cwd, env=env, **streams)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


# ---- the server


class Server:
    """Starts the process that forks. A socket in a directory of its own is where it is asked."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="forks-")
        os.environ[VARIABLE] = path = os.path.join(self._directory.name, "socket")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind(path)
        listening.listen(64)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # a fork of a process with threads hangs
        with listening:
            command = [sys.executable, "-m", "tests.forks", str(listening.fileno())]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._directory.cleanup()


def serve(listening: socket.socket) -> None:
    """Fork a process for each connection, and tell its number and, when it has ended, its exit code."""
    imported = False
    with selectors.DefaultSelector() as ready:
        ready.register(sys.stdin, selectors.EVENT_READ)
        ready.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listening:
                    client, _ = listening.accept()
                    ready.register(client, selectors.EVENT_READ, None)
                elif key.data is None:  # a request; or its client is gone
                    ready.unregister(client := key.fileobj)
                    imported = imported or _import()
                    _fork(client, ready)
                else:  # a process has ended
                    client, pid = key.data
                    ready.unregister(key.fileobj)
                    os.close(key.fileobj)
                    _, status = os.waitpid(pid, 0)
                    _tell(client, os.waitstatus_to_exitcode(status))
                    client.close()


def _fork(client: socket.socket, ready: selectors.BaseSelector) -> None:
    content, descriptors, _, _ = socket.recv_fds(client, REQUEST_BYTES, 16)
    if not content:
        client.close()
        return
    if (pid := os.fork()) == 0:
        _become(json.loads(content), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    _tell(client, pid)
    ready.register(os.pidfd_open(pid), selectors.EVENT_READ, (client, pid))


def _tell(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody waits for it any more
        client.send(str(number).encode())


def _import() -> bool:
    from rlinvariant import runtime

    runtime.configure()
    with importing():
        for name in MODULES:
            importlib.import_module(name)
    return True


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the process that was asked for, and end with its exit code."""
    import numpy as np
    import torch

    def main() -> None:
        os.setsid()
        for target, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
        random.seed()
        np.random.seed()
        first, *rest = request["arguments"]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path[0] = os.path.dirname(first)
            runpy.run_path(first, run_name="__main__")

    end_with(main)


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """End this process, a fork, as Python ends one that runs a function alone: with its exit code, or by what it raises."""
    code: int | None = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code if end.code is None or isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)  # exit handlers would join threads that the fork does not have


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
