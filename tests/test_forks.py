"""The process that forks the tests' processes: its end is said, and nobody waits for it."""

import os
import socket
import threading

import pytest

from tests import forks


def test_a_server_that_ends_is_said(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(path := str(tmp_path / "socket"))
        listening.listen()
        monkeypatch.setenv(forks.VARIABLE, path)
        ends = threading.Thread(target=lambda: listening.accept()[0].close())
        ends.start()
        with pytest.raises((RuntimeError, ConnectionError)):
            forks.run(["-c", "pass"], cwd=tmp_path, env=os.environ)
        ends.join()
    with pytest.raises(ConnectionError):  # nobody is there any more
        forks.run(["-c", "pass"], cwd=tmp_path, env=os.environ)
