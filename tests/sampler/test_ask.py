"""`rlinvariant.sampler.ask`: the engine process is a spawned one, and knows us by the entry point alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from rlinvariant.sampler.ask import IN_ITS_OWN_PROCESS
from rlinvariant.sampler.names import NOT_ACTIVE
from tests import forks

FORKING = """
import multiprocessing, sys
from rlinvariant.sampler.ask import ask
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor
utils.get_mp_context = multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
print("exact: " + ask(sys.argv[1]))
"""


def asked(directory: Path, *program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("name", IN_ITS_OWN_PROCESS)
def test_vllm_knows_the_variables_that_are_set(name):
    assert name in vllm.envs.environment_variables, f"vLLM does not read {name}"


@pytest.mark.slow
def test_the_engine_process_finds_the_plugin_by_its_entry_point(tmp_path):
    done = asked(tmp_path, "-m", "rlinvariant.sampler.ask")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact: engine process" in done.stdout and "2 attention layers, 9 products" in done.stdout


@pytest.mark.slow
def test_a_hidden_entry_point_is_named(tmp_path):
    """The child does not have what the parent registers, and says itself what it lacks."""
    done = asked(tmp_path, "-m", "rlinvariant.sampler.ask", VLLM_PLUGINS="another")
    assert done.returncode != 0 and "exact:" not in done.stdout
    assert f"UserError: {NOT_ACTIVE}" in done.stderr, done.stderr[-3000:]


def test_a_forked_engine_proves_nothing(tmp_path):
    """A forked child has its parent's registration; with the entry point hidden, it could have it from nowhere else."""
    (tmp_path / "forking.py").write_text(FORKING)
    done = forks.run(["forking.py", str(tmp_path)], cwd=tmp_path, env=os.environ | {"VLLM_PLUGINS": "another"})
    assert done.returncode != 0 and "exact:" not in done.stdout
    assert "the engine's process was forked" in done.stderr, done.stderr[-3000:]
