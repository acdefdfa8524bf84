"""A server as a user starts it, for the tests that ask one."""

import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests import forks


@dataclass
class Server:
    """`python ARGUMENTS`, forked on a CPU; ours starts its engine's process itself, and anew, as everywhere."""

    arguments: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("w") as log, open(os.devnull) as null:
            arguments = [*self.arguments, "--port", str(port)]
            self.process = forks.start(arguments, self.log.parent, os.environ | self.env, null, log, log)

    def wait(self, seconds: float = 240) -> str:
        """Wait until the server is healthy; return what it printed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self.log.read_text()
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"{self.arguments} did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
