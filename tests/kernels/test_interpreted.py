"""The GPU kernels' arithmetic, without a GPU: Triton's interpreter runs them on CPU tensors, beside the CPU ops.

The interpreter computes each program with NumPy: it sees wrong indices, masks and formulas, and says nothing of bits or speed.
It is chosen when Triton is imported, so all of it runs in one process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_triton_kernels_match_the_cpu_ops():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.startswith("skip: "):
        pytest.skip(done.stdout.removeprefix("skip: ").strip())
    assert done.stdout.split()[:2] == ["compared", "114"], done.stdout
