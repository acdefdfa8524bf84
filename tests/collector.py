"""Imported objects, a million once vLLM and TRL are there, are hidden from the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze


@contextmanager
def importing() -> Iterator[None]:
    """Hide all that a block imports from the garbage collector, and leave it at that.

    The start of an engine looks at every object six times. vLLM then hides them all with `gc.freeze`, and the next start brings
    them back with `gc.unfreeze`, so that an earlier engine can be collected. Both together are more than half of a start.
    """
    gc.disable()
    yield
    gc.enable()
    FREEZE()
    gc.freeze = gc.unfreeze = lambda: None
