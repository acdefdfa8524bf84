"""A server as a user starts it, for the tests that ask one."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from rlinvariant.bench.served import kept_port
from tests import forks


@dataclass
class Server:
    """`python ARGUMENTS`, forked on a CPU; ours starts its engine's process itself, and anew, as everywhere."""

    arguments: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = kept_port()
        port = self._kept.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("w") as log, open(os.devnull) as null:
            arguments = [*self.arguments, "--port", str(port)]
            self.process = forks.start(arguments, self.log.parent, os.environ | self.env, null, log, log)

    def wait(self, seconds: float = 500) -> str:
        """Wait until the server is healthy; return what it printed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self.log.read_text()
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"{self.arguments} did not start:\n{self.log.read_text()[-4000:]}")

    @contextmanager
    def engine_stopped(self) -> Iterator[None]:
        """Let the engine's process stand still meanwhile: what it is asked for begins, and does not end."""
        engine = psutil.Process(int(self.wait().partition("exact: engine process ")[2].partition(":")[0]))
        engine.suspend()
        try:
            while engine.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
            yield
        finally:
            with suppress(psutil.NoSuchProcess):  # a test may have ended it
                engine.resume()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(300)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._kept.close()
