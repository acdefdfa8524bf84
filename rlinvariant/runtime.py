"""Settings of the process that an engine needs before it starts: set once, recorded, refused where others are set."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rlinvariant.errors import UserError

VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process, so that weights are copied, not sent
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # V2 rounds logits / T to bf16, and its sampler cannot be replaced from outside
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # draws without per-request seeds
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would move the trainer's threads too
}
MEMORY = {
    # How many kernels oneDNN and PyTorch's layer above it keep, each for one shape. The number of tokens in a batch is another
    # one at nearly every step, and the default, 1,024 each, fills up for hundreds of steps: 700 MB in 300 of a tiny model.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLASHINFER_LOGGING_LEVEL": "error",  # of its logger, which `logging.getLogger` does not find
}


BEFORE_TORCH = {
    # Spinning threads make a run 10 times slower as soon as cores are shared
    "OMP_WAIT_POLICY": "passive",
    # "Using MEMBIND policy for memory allocation", of vLLM on a CPU; "is an experimental feature", of a switch for cuBLASLt
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


_late: list[str] = []  # of them, those that torch has read without our values


def before_torch() -> None:
    """Set the variables that libraries read once, when torch is imported; afterwards it would change nothing."""
    for name, value in BEFORE_TORCH.items():
        if name not in os.environ and "torch" in sys.modules:
            _late.append(name)
        os.environ.setdefault(name, value)


def late_notes() -> list[str]:
    """Return a line if this process has imported torch before rlinvariant, where that costs time: on a CPU."""
    import torch

    if "OMP_WAIT_POLICY" not in _late or torch.cuda.is_available():
        return []
    why = "its threads spin while they wait, which is slow on cores that others use, too"
    return [f"torch was imported before rlinvariant: {why}; import rlinvariant first, or set OMP_WAIT_POLICY=passive"]


@contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector from looking, again and again, at all that a block imports: an eighth of a start's time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def configure() -> dict[str, str]:
    """Set the variables that vLLM reads when an engine starts, and return them; call `quiet`.

    Raises:
        UserError: one of them is set to another value.
    """
    if wrong := [k for k, v in VLLM.items() if os.environ.get(k, v) != v]:
        found = ", ".join(f"{k}={os.environ[k]}" for k in wrong)
        raise UserError(f"environment: {found}: expected {', '.join(f'{k}={VLLM[k]}' for k in wrong)}; unset it")
    for name, value in (VLLM | MEMORY | QUIET).items():
        os.environ.setdefault(name, value)
    quiet()
    return dict(VLLM)


def quiet() -> None:
    """Silence what is printed at every start and needs nobody's attention."""
    # TRL warns of vLLM releases that its own client was not tested with; that client is not used here
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    # TRL uses names that transformers 5.24 renames
    warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.backends.cuda.preferred_blas_library")  # kernels/linear.py uses it
    # transformers takes vLLM's group of one process, which an earlier trainer of this process has left, for a launcher's
    logging.getLogger("transformers.training_args").addFilter(_of_interest)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # two lines for each retry; then it raises
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)  # says that a CPU has no Triton


def random_state_kept() -> AbstractContextManager[None]:
    """Give torch's random state back afterwards: the host's, and that of this process's GPU.

    `fork_rng` alone keeps the state of every GPU that is visible, and starts a context on each, of half a gigabyte.
    """
    import torch

    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _of_interest(record: logging.LogRecord) -> bool:
    return "torch.distributed process group is initialized, but" not in str(record.msg)
