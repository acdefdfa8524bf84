"""The attention of our own, without a GPU: its bits in Triton's interpreter, and its machine code for chips that are not here.

In the interpreter a matrix unit stands in whose sums have an order (matrix_unit.py), so blocks, chunks, folds, masks, windows
and pages are tried for bits, with operands whose values cancel. It cannot show what a layout of threads decides: that `tl.sum`
would follow it, and that the widths of a chip's matrix instructions agree, only a GPU can say (test_chunked_gpu.py).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "rlinvariant/kernels/attention_tiles.json").read_text())["chips"]
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # that a program may have
# Of some paged kernels for chips of mma.sync alone, a word or a few that a loop reads once go to memory
# Of sm_90: with 128 keys a block and heads of 128, part of the chunks before goes there, and an H200 decodes 1.3 times as fast
# as with 64 keys, which spill nothing.
FEW_BYTES = dict.fromkeys(SHARED_KIB, 16) | {"sm_90": 136}
SIXTEEN_DEEP = re.compile(r"(?:mma|wgmma).*\.m\d+n\d+k16\.|tcgen05\.mma.*kind::f16")  # of the last: 16 of bf16 by definition


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


def test_every_chip_has_a_row_for_every_head_size():
    """Blocks divide chunks; a tile has at least the rows of a matrix instruction; names of chips lead to rows."""
    assert TABLE.keys() == SHARED_KIB.keys()
    for rows in TABLE.values():
        rows = TABLE[rows] if isinstance(rows, str) else rows
        assert list(rows) == ["64", "128", "256"]
        for row in rows.values():
            block, chunk = row["order"]
            assert block % 16 == 0 and chunk % block == 0
            for tiles in (row["tiles"], row.get("rich", row["tiles"])):
                assert list(map(int, tiles)) == sorted(map(int, tiles)) and all(tile[0] >= 16 for tile in tiles.values())


@pytest.mark.slow
@pytest.mark.parametrize("chip", TABLE)
def test_code_for_a_chip_multiplies_sixteen_deep_hardly_spills_and_adds_nothing_atomically(chip):
    """Compiled with the Triton that is installed, without a GPU."""
    kernels = [json.loads(line) for line in run("tests.kernels.compiled", chip, "attention").splitlines()]
    assert len(kernels) > 20
    assert_exact_code(kernels, chip)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("mixtures", 23), ("truncation", 2), ("sums", 4)])
def test_other_code_multiplies_sixteen_deep_hardly_spills_and_adds_nothing_atomically(kind, count):
    kernels = [json.loads(line) for line in run("tests.kernels.compiled", "sm_90", kind).splitlines()]
    assert len(kernels) == count
    assert_exact_code(kernels, "sm_90")


@pytest.mark.slow
def test_a_sum_is_laid_out_by_the_alignment_of_what_callers_align_and_nothing_else():
    from tests.kernels.layouts import ALIGNED  # needs Triton

    assert json.loads(run("tests.kernels.layouts")) == [[*pair] for pair in ALIGNED]


def assert_exact_code(kernels: list[dict[str, Any]], chip: str) -> None:
    for kernel in kernels:
        name, products = kernel["name"], kernel["products"]
        assert bool(products) == (not name.startswith(("fold", "plan"))), name
        assert all(SIXTEEN_DEEP.search(p) for p in products), (name, sorted(set(products)))
        assert not kernel["atomics"], name
        assert kernel["stack"] <= FEW_BYTES[chip], f"{name}: {kernel['stack']} bytes spill"
        assert kernel["shared"] <= SHARED_KIB[chip] << 10, f"{name}: {kernel['shared']} bytes of shared memory"


def test_other_depths_are_found():
    """Control of the pattern."""
    right = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    assert all(SIXTEEN_DEEP.search(p) for p in (*right, "tcgen05.mma.cta_group::1.kind::f16"))
    wrong = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tcgen05.mma.cta_group::1.kind::tf32"
    assert not any(SIXTEEN_DEEP.search(p) for p in wrong)
