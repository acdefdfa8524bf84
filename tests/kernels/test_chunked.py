"""The attention of our own, without a GPU: its bits in Triton's interpreter. (Its machine code: test_compiled.py.)

In the interpreter a matrix unit stands in whose sums have an order (matrix_unit.py), so blocks, chunks, folds, masks, windows
and pages are tried for bits, with operands whose values cancel. It cannot show what a layout of threads decides: that `tl.sum`
would follow it, and that the widths of a chip's matrix instructions agree, only a GPU can say (test_chunked_gpu.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_packed_and_paged_calls_have_the_same_bits():
    assert run("tests.kernels.chunked", TRITON_INTERPRET="1").split() == ["compared", "6", "controls", "1"]


@pytest.mark.slow
def test_every_form_has_the_bits_of_its_packed_call_and_its_gradients():
    assert run("tests.kernels.chunked", "full", TRITON_INTERPRET="1").split() == ["compared", "180", "controls", "4"]
