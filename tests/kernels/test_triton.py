"""The Triton compiler's work on the kernels: nothing here depends on values, so it is read off the machine code."""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import ladders
from tests.kernels.cases import CASES, WITHOUT_GRADIENT
from tests.kernels.test_compiled import FEW_BYTES
from tests.kernels.test_linear import TUNED, small_bias

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

MODULES = (
    "linear",
    "moe_experts",
    "moe_route",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "scale_logits",
    "swiglu",
    "threshold",
    "token_logprobs",
)
ATOMIC = re.compile(r"\b(?:atom|red)\.")
PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+")
CANONICAL = re.compile(r"\.m\d+n\d+k16\..*f32\.bf16\.bf16")  # sixteen bf16 products at a time into fp32


def functions() -> Iterator[tuple[str, Any]]:
    from triton import JITFunction

    for module in MODULES:
        for name, function in vars(importlib.import_module(f"rlinvariant.kernels.{module}")).items():
            if isinstance(function, JITFunction):
                yield f"{module}.{name}", function


@pytest.fixture(scope="module")
def kernels() -> list[tuple[str, Any]]:
    """Return the kernels of a call and a gradient of every op, and a call of every tuned tile, with shapes like a model's.

    (Rows that no 16 bytes divide, as other tests have them, cost some tiles their registers.)
    """
    device = torch.cuda.current_device()
    for _, function in functions():
        function.device_caches.clear()
    with torch.device("cuda"):
        for name, case in CASES.items():
            f, inputs = case()
            f(*inputs)
            if name not in WITHOUT_GRADIENT:
                ladders.gradients(f, inputs)
        linear = importlib.import_module("rlinvariant.kernels.linear")
        x, w = ladders.cancelling(40, 512, 3072, torch.bfloat16)
        for tile in (*TUNED, linear.FALLBACK_TILE):
            linear.tiled(x, w, small_bias(512), tile)
    used = [(name, f.device_caches[device][0]) for name, f in functions() if device in f.device_caches]
    return [(name, kernel) for name, cache in used for kernel in cache.values()]


def test_every_kernel_is_looked_at(kernels):
    expected = {
        "linear._tile_kernel",
        "moe_experts._combine",
        "moe_experts._grouped",
        "moe_experts._summed",
        "moe_experts._tiles",
        "moe_route._route",
        "qk_norm_rope._kernel",
        "rms_norm._forward",
        "rms_norm._backward",
        "rope._turn",
        "scale_logits._forward",
        "scale_logits._backward",
        "swiglu._forward",
        "swiglu._backward",
        "threshold._tops",
        "threshold._chosen",
        "token_logprobs._blocks",
        "token_logprobs._logprobs",
        "token_logprobs._gradient",
        "token_logprobs._draw",
        "token_logprobs._likelier",
    }
    assert {name for name, _ in kernels} >= expected


def test_hardly_anything_spills(kernels):
    assert not {f"{name}: {kernel.n_spills} words" for name, kernel in kernels if 4 * kernel.n_spills > FEW_BYTES}


def test_nothing_is_added_atomically(kernels):
    assert not {name for name, kernel in kernels if ATOMIC.search(kernel.asm["ptx"])}


def test_every_tile_multiplies_sixteen_bf16_at_a_time_into_fp32(kernels):
    tiles = [kernel.asm["ptx"] for name, kernel in kernels if name == "linear._tile_kernel"]
    for ptx in tiles:
        products = PRODUCT.findall(ptx)
        assert products and all(CANONICAL.search(p) for p in products), products


def test_the_patterns_find_what_they_look_for():
    """Control: PTX of an atomic addition, of a reduction in memory, and of products of other widths and types."""
    for line in ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", "@%p1 red.global.add.f32 [%rd1], %f2;"):
        assert ATOMIC.search(line)
    for line in ("mov.b32 %r1, %shared.red;", "ld.global.b32 %atom1, [%rd1];"):
        assert not ATOMIC.search(line)
    right = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
    wrong = "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {"
    assert all(CANONICAL.search(*PRODUCT.findall(line)) for line in right)
    assert not any(CANONICAL.search(*PRODUCT.findall(line)) for line in wrong)
