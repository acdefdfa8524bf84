"""`rlinvariant serve` ends as every command does: by a signal with its exit code and a line, and never as if all were well."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from rlinvariant.bench.served import kept_port
from tests.commands import interruptible

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
ENGINE = 0  # in place of a signal to the server: its engine is killed


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=SLOW),
        pytest.param(signal.SIGHUP, 129, "stopped by SIGHUP", marks=SLOW),
        pytest.param(ENGINE, 1, "error: vLLM's engine has ended (the cause is in the log above)", marks=SLOW),
    ],
)
def test_a_server_ends_with_the_code_and_the_line_of_a_command(number, code, line, arithmetic_dir, tmp_path):
    """It is started as a user starts it: a fork has no end of an interpreter, whose lines would be the last."""
    log, env = tmp_path / "log", os.environ | {"PYTHONPATH": str(ROOT)}
    with kept_port() as kept, log.open("w") as out, interruptible():
        port = kept.getsockname()[1]
        options = ["--port", str(port), "--max-model-len", "64", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager"]
        command = [sys.executable, "-m", "rlinvariant", "serve", arithmetic_dir, *options]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, process_group=0)
        try:
            while server.poll() is None and not _is_up(port):
                time.sleep(0.2)
            (engine,) = re.findall(r"exact: engine process (\d+):", log.read_text())
            os.kill(*((server.pid, number) if number else (int(engine), signal.SIGKILL)))
            ended = server.wait(300)
        finally:
            server.kill()
            server.wait()
    said = log.read_text()
    assert ended == code and said.count(f"\n{line}\n") == 1, said[-3000:]
    if number:
        assert said.endswith(f"\n{line}\n") and "Traceback" not in said, said[-3000:]


@SLOW
def test_a_server_whose_engine_is_not_exact_says_so_and_does_not_start(arithmetic_dir, tmp_path):
    unproven = """
import sys
from vllm.v1.engine.async_llm import AsyncLLM
from rlinvariant.cli import main

async def collective_rpc(self, method, *args, **kwargs):
    raise RuntimeError(f"planted: {method}")

if __name__ == "__main__":
    AsyncLLM.collective_rpc = collective_rpc
    sys.exit(main(sys.argv[1:]))
"""
    (script := tmp_path / "unproven.py").write_text(unproven)
    options = ["--port", "0", "--max-model-len", "64", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager"]
    command = [sys.executable, str(script), "serve", arithmetic_dir, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 1 and "\nerror: the engine is not exact: planted: prove\n" in done.stderr, done.stderr[-3000:]


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False
