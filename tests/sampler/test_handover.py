"""Memory goes to another process of this host, and what is at the same place by chance is not taken for it."""

import os
import resource
import subprocess
import sys

import pytest

from rlinvariant.errors import UserError
from rlinvariant.sampler import handover
from rlinvariant.sampler.server import Gone, Server
from rlinvariant.trainer_token import Token

MARK = "0123456789abcdef" * 2


def test_another_process_reads_what_was_written():
    file = handover.made(MARK)
    other = handover.opened(handover.place_of(file), MARK)
    assert other is not None
    for many in (3000, 1):  # more buffers than one call takes; then fewer bytes than before
        buffers = [bytes([i % 256]) * (i % 7) for i in range(many)] + [memoryview(b"end")]
        handover.write(other, buffers)
        read = f"import sys; sys.stdout.buffer.write(open({handover.path_of(file)!r}, 'rb').read())"
        assert subprocess.run([sys.executable, "-c", read], capture_output=True, check=True).stdout == b"".join(buffers)


def test_writes_that_stop_in_the_middle_go_on(monkeypatch):
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, at: pwritev(file, [memoryview(buffers[0])[:5]], at))
    file = handover.made()
    handover.write(file, [b"0123456789abc", b"", memoryview(b"defg"), b"h"])
    file.seek(0)
    assert file.read() == b"0123456789abcdefgh"


def test_memory_without_room_is_one_line():
    """The limit on the size of files holds for this memory too. Control: with room the server is asked, which is not there."""
    server = Server("http://127.0.0.1:9", Token("x" * 32))
    server.memory = [handover.made()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="^sampler.servers=http://127.0.0.1:9: no room .* for 1,001 bytes"):
            server.send([bytes(1001)])
        with pytest.raises(Gone):
            server.send([bytes(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_not_the_other_sides_memory_is_not_opened(tmp_path):
    """The control: with its mark it is."""
    file = handover.made(MARK)
    place = handover.place_of(file)
    assert handover.opened(place, MARK) is not None
    (tmp_path / "mine").write_text("x" * 32)
    with open(tmp_path / "mine", "r+") as mine:
        own, (pipe, _) = (os.getpid(), mine.fileno()), os.pipe()
        for wrong in (
            place[:1],
            None,
            "ab",
            ["../..", 0],
            [float("inf"), 0],
            [*place, 1],
            (place[0], 10**6),
            (2**40, 3),
            own,
            (os.getpid(), pipe),
        ):
            assert handover.opened(wrong, MARK) is None, wrong
    for mark in (MARK[:-1], MARK + "0", MARK.upper(), ""):
        assert handover.opened(place, mark) is None, mark
    assert (tmp_path / "mine").read_text() == "x" * 32


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is to be had as root alone")
def test_another_user_cannot_open_it():
    file = handover.made(MARK)
    read = f"import os; os.setuid(65534); open({handover.path_of(file)!r}, 'rb')"
    assert b"PermissionError" in subprocess.run([sys.executable, "-c", read], capture_output=True).stderr
