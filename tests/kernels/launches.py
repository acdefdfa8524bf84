"""Make the launches of a GPU that is not here: each is compiled as the tensors of the call want it, and not started.

The functions that a GPU runs are called with CPU tensors of a model's shapes, so options, constants and what a kernel may know
of alignment are theirs. What comes back is memory that nobody has written. Attention and mixtures, which look at their GPU, are
compiled in compiled.py.
"""

import functools
import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import rlinvariant.kernels
from rlinvariant.kernels import linear, qk_norm_rope, rms_norm, rope, scale_logits, swiglu, token_logprobs
from tests.kernels.test_linear import TUNED

ROWS, VOCAB = 48, 151_936


class Absent:
    """Tells Triton of a GPU."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0


def functions() -> dict[str, JITFunction]:
    """Return all that Triton compiles of rlinvariant.kernels, by "module.name"."""
    names = [x.name for x in pkgutil.iter_modules(rlinvariant.kernels.__path__)]
    modules = {name: importlib.import_module(f"rlinvariant.kernels.{name}") for name in names}
    return {
        f"{module}.{name}": f
        for module, of in modules.items()
        for name, f in vars(of).items()
        if isinstance(f, JITFunction) and f.__module__ == of.__name__
    }


def kernels() -> set[str]:
    """Return the names of those that are launched: what no other calls."""
    found = functions()
    calls = [(f.fn.__globals__, re.findall(r"(?<!def )\b(\w+)\(", f.src)) for f in found.values()]
    called = {id(known.get(name)) for known, names in calls for name in names}
    return {name for name, f in found.items() if id(f) not in called}


@contextmanager
def compiling(chip: int) -> Iterator[None]:
    """Compile for a chip what is launched inside, and launch nothing."""
    launch = JITFunction.__getitem__
    driver.set_active(Absent(chip))  # pyright: ignore[reportArgumentType]
    JITFunction.__getitem__ = lambda f, grid: functools.partial(f.run, grid=grid, warmup=True)
    try:
        yield
    finally:
        JITFunction.__getitem__ = launch


def launched(chip: int) -> Iterator[tuple[str, Any]]:
    """Yield each kernel that `calls` asks for: its name and what the compiler has made of it."""
    with compiling(chip):
        calls(f"sm_{chip}")
    for name, f in functions().items():
        for made in f.device_caches[chip][0].values() if chip in f.device_caches else ():
            yield name, made


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def fp32(*shape: int) -> Tensor:
    return torch.empty(shape)


def calls(chip: str) -> None:
    products(chip)
    norms()
    heads()
    elements()
    head_of_the_model()


def products(chip: str) -> None:
    """Call every tile that `linear` may take on a chip: with a depth that its own divides, and with another."""
    tiles = {*linear.SAFE_TILES.values(), linear.FALLBACK_TILE, *(TUNED if chip == linear.TUNED_CHIP else ())}
    for tile in sorted(tiles):
        for depth, bias in ((3072, bf16(512)), (3104, None)):
            linear.tiled(bf16(ROWS, depth), bf16(512, depth), bias, tile)


def norms() -> None:
    """Call the norms of heads in a merged projection, and of rows that take four warps and eight."""
    for x in (bf16(ROWS, 48 * 128)[:, : 32 * 128].unflatten(1, (-1, 128)), bf16(ROWS, 2048), bf16(ROWS, 8192)):
        for w, offset in ((bf16(x.shape[-1]), None), (fp32(x.shape[-1]), 1.0)):
            rms_norm.rms_norm(x, w, 1e-6, offset)
            rms_norm.add_rms_norm(x, x, w, 1e-6, offset)
            for total in (None, x):
                rms_norm.rms_norm_backward(x, x, w, total, 1e-6, offset)


def heads() -> None:
    """Call the rotation of all columns of a head and of some, alone and after the norms."""
    q, k, _ = (x.unflatten(1, (-1, 128)) for x in bf16(ROWS, 48 * 128).split([32 * 128, 8 * 128, 8 * 128], 1))
    for half in (64, 20):
        cos, sin = fp32(ROWS, half), fp32(ROWS, half)
        rope.rope(q, cos, sin, 1.0)
        for weights, offset in (((None, None), None), ((bf16(128), bf16(128)), None), ((fp32(128), fp32(128)), 1.0)):
            qk_norm_rope.qk_norm_rope(q, k, *weights, cos, sin, 1e-6, offset)


def elements() -> None:
    gate, up = bf16(ROWS, 2 * 6144).chunk(2, -1)
    for activation in ("silu", "gelu_tanh"):
        swiglu.swiglu(gate, up, activation)
        swiglu.swiglu_backward(gate, gate, up, activation)
        swiglu.swiglu_merged_backward(gate, bf16(ROWS, 2 * 6144), activation)
    for form in ((0.3, None), (None, 30.0)):
        scale_logits.scale_logits(gate, *form)
        scale_logits.scale_logits_backward(gate, gate, *form)


def head_of_the_model() -> None:
    """Call log-probs, their gradients and draws, of whole vocabularies and of truncated ones."""
    logits, one = bf16(ROWS, VOCAB), fp32(ROWS)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    stats = torch.empty(ROWS, 2, dtype=torch.float64)
    for theta, dentropy in itertools.product((None, one), (None, one)):
        token_logprobs.row_logprobs(logits, ids, one, theta)
        token_logprobs.row_logprobs_backward(logits, ids, one, one, dentropy, theta, one, one, stats)
        token_logprobs.sample(logits, one, ids, ids, theta)
