"""A tensor core for Triton's interpreter, so that it can say something of bits: import this before kernels run.

As on Hopper: 16 products of bf16 are added exactly to an fp32 accumulator, and the sum is cut towards zero, row by row.
NumPy's own product would take other orders for other numbers of rows.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

DEPTH = 16


def _wide(operand: Any) -> np.ndarray:
    """Return the values of an operand in fp64; the interpreter keeps bf16 as words."""
    data = operand.data
    return ((data.astype(np.uint32) << 16).view(np.float32) if operand.dtype.scalar == tl.bfloat16 else data).astype(np.float64)


def towards_zero(x: np.ndarray) -> np.ndarray:
    """Return x, fp64 of any shape, cut to fp32."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
    x, y, sums = _wide(a), _wide(b), acc.data
    for k in range(0, x.shape[1], DEPTH):
        products = x[:, k : k + DEPTH, None] * y[None, k : k + DEPTH]
        sums = towards_zero(sums.astype(np.float64) + products.sum(1))
    return interpreter.TensorHandle(sums, acc.dtype.scalar)


class _Patched:
    """Makes the interpreter's patches of `triton.language` once: made again at every call, they take most of the time."""

    def __init__(self, patch: Any) -> None:
        self.patch, self.done = patch, set()

    def __call__(self, function: Any) -> "_Patched":
        modules = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if modules not in self.done:
            self.patch(function)
            self.done.add(modules)
        return self

    def restore(self) -> None:
        pass


interpreter.InterpreterBuilder.create_dot = dot
interpreter._patch_lang = _Patched(interpreter._patch_lang)
