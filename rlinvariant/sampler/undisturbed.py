"""Contexts in which vLLM leaves the process as it was: its random state, its threads, its standard output."""

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout

import numpy as np
import torch

from rlinvariant.runtime import random_state_kept


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the trainer's random state and thread control: vLLM reseeds torch and disables `torch.set_num_threads`."""
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    python, numpy = random.getstate(), np.random.get_state()
    with random_state_kept():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads = set_threads
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def stdout_with_descriptor() -> AbstractContextManager[object]:
    """Redirect stdout where it has no file descriptor, as in a notebook: vLLM silences NCCL through it, and would raise."""
    try:
        sys.stdout.fileno()
    except (AttributeError, OSError):  # io.UnsupportedOperation is one
        return redirect_stdout(sys.__stdout__)
    return nullcontext()
