"""The machine code of every GPU kernel for every chip that may be tried, compiled without a GPU.

Twice: with the Triton that is installed, the newest there is for these ranges, and (`make compile`) with the one that a GPU
runs, which PyTorch's CUDA wheel asks for. Of two releases the layouts, registers and shared memory of a kernel differ.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.support import CAPABILITY, RELEASES

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "rlinvariant/kernels/attention_tiles.json").read_text())["chips"]
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # that a program may have
PRODUCTS = {  # the kernels that multiply matrices
    "chunked_attention._tiles",
    "chunked_backward._of_keys",
    "chunked_backward._of_queries",
    "chunked_decode._parts",
    "linear._tile_kernel",
    "moe_experts._grouped",
    "moe_experts._summed",
}
FEW_BYTES = 16  # of some kernels a few words go to memory that a loop reads once
# Of sm_90, with 128 keys a block, part of the chunks before goes there, and an H200 decodes 1.3 times as fast as with 64 keys,
# which spill nothing.
MORE_BYTES = {  # by which Triton
    "installed": {("sm_90", "chunked_attention._tiles"): 136, ("sm_90", "chunked_decode._parts"): 136},
    "GPU's": {
        ("sm_90", "chunked_attention._tiles"): 280,
        ("sm_100", "chunked_attention._tiles"): 24,
        ("sm_100", "moe_experts._grouped"): 24,
        ("sm_120", "chunked_attention._tiles"): 32,
        ("sm_120", "threshold._chosen"): 40,
    },
}
SIXTEEN_DEEP = re.compile(r"(?:mma|wgmma).*\.m\d+n\d+k16\.|tcgen05\.mma.*kind::f16")  # of the last: 16 of bf16 by definition
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]


def required() -> str:
    """Return the Triton that PyTorch's CUDA wheel asks for, of the release on which exact mode is proven."""
    torch = f"torch=={RELEASES['torch'][-1]}.*"
    asked = [*PIP, "--dry-run", "--ignore-installed", "--report", "-", torch]  # reads the wheel's metadata, and not the wheel
    report = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    needs = report["install"][0]["metadata"]["requires_dist"]
    found = [match[1] for need in needs if (match := re.match(r"triton==([\d.]+)", need))]
    assert len(found) == 1, f"{torch}: {needs}"
    return found[0]


def output(triton: Path | None, module: str, *arguments: str) -> list[Any]:
    """Return what a module prints, a value a line; triton: the folder of a release other than the installed one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (triton, ROOT)))), "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Code:
    """Holds a Triton, its release, what it makes for each chip, and the operands on whose alignment it lays out a sum."""

    which: str  # of MORE_BYTES
    release: str
    chips: dict[str, Future[list[Any]]]
    aligned: Future[list[Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param("installed", marks=pytest.mark.slow), pytest.param("GPU's", marks=pytest.mark.contract)],
)
def code(request, tmp_path_factory) -> Iterator[Code]:
    release, place = version("triton"), None
    with ThreadPoolExecutor(2) as two:
        if request.param != "installed":
            release, place = required(), tmp_path_factory.mktemp("triton")
            subprocess.run([*PIP, "--target", str(place), f"triton=={release}"], check=True)
        chips = {chip: two.submit(output, place, "tests.kernels.compiled", chip) for chip in TABLE}
        yield Code(request.param, release, chips, two.submit(output, place, "tests.kernels.layouts"))
        two.shutdown(cancel_futures=True)
    if place:
        shutil.rmtree(place)  # 600 MB


@pytest.mark.parametrize("chip", TABLE)
def test_code_for_a_chip_multiplies_sixteen_deep_hardly_spills_and_adds_nothing_atomically(code, chip):
    *kernels, said = code.chips[chip].result()
    assert said == {"triton": code.release, "left_out": []}
    wrong = [line for kernel in kernels for line in faults(kernel, chip, code.which)]
    assert not wrong, "\n".join(wrong)


def test_a_sum_is_laid_out_by_the_alignment_of_what_callers_align_and_nothing_else(code):
    from tests.kernels.layouts import ALIGNED  # needs Triton

    assert code.aligned.result() == [[[*pair] for pair in ALIGNED]]


def faults(kernel: dict[str, Any], chip: str, which: str = "installed") -> Iterator[str]:
    name, products = kernel["name"], kernel["products"]
    if bool(products) != (kernel["function"] in PRODUCTS) or not all(SIXTEEN_DEEP.search(p) for p in products):
        yield f"{name}: products {products}"
    if kernel["atomics"]:
        yield f"{name}: {kernel['atomics']} atomic additions"
    if kernel["stack"] > MORE_BYTES[which].get((chip, kernel["function"]), FEW_BYTES):
        yield f"{name}: {kernel['stack']} bytes spill"
    if kernel["shared"] > SHARED_KIB[chip] << 10:
        yield f"{name}: {kernel['shared']} bytes of shared memory"


def test_faults_are_found():
    """Control: one kernel of each fault, and of none."""
    right = {
        "name": "a tile",
        "function": "linear._tile_kernel",
        "products": ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"],
        "atomics": 0,
        "stack": FEW_BYTES,
        "shared": 99 << 10,
    }
    assert not list(faults(right, "sm_89"))
    tf32 = ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"]
    for fault in ({"products": []}, {"products": tf32}, {"atomics": 1}, {"stack": FEW_BYTES + 8}, {"shared": (99 << 10) + 1}):
        assert len(list(faults(right | fault, "sm_89"))) == 1
    assert list(faults(right | {"function": "rope._turn"}, "sm_89")), "a product where there should be none"


def test_every_chip_that_may_be_tried_is_compiled_for():
    assert TABLE.keys() == SHARED_KIB.keys() == {f"sm_{major}{minor}" for major, minor in CAPABILITY}


def test_every_chip_has_a_row_for_every_head_size():
    """Blocks divide chunks; a tile has at least the rows of a matrix instruction; names of chips lead to rows."""
    for rows in TABLE.values():
        rows = TABLE[rows] if isinstance(rows, str) else rows
        assert list(rows) == ["64", "128", "256"]
        for row in rows.values():
            block, chunk = row["order"]
            assert block % 16 == 0 and chunk % block == 0
            for tiles in (row["tiles"], row.get("rich", row["tiles"])):
                assert list(map(int, tiles)) == sorted(map(int, tiles)) and all(tile[0] >= 16 for tile in tiles.values())


def test_other_depths_are_found():
    """Control of the pattern."""
    right = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    assert all(SIXTEEN_DEEP.search(p) for p in (*right, "tcgen05.mma.cta_group::1.kind::f16"))
    wrong = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tcgen05.mma.cta_group::1.kind::tf32"
    assert not any(SIXTEEN_DEEP.search(p) for p in wrong)
