"""Syntax trees of sources, for tests that read them."""

import ast
import gc
from typing import Any


def parsed(source: str, mode: str = "exec") -> Any:
    """Return the tree of a source.

    The collector is off meanwhile: what it ends may run Python, in this thread or another, and CPython 3.11 counts the depth of
    all trees that are being made in one number ("AST constructor recursion depth mismatch").
    """
    on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, mode=mode)
    finally:
        if on:
            gc.enable()
