"""Build the CPU kernels, kernels/*.c, with the machine's own compiler and call it.

The library is built once per sources, flags, compiler and processor, in about three seconds, and kept under
`~/.cache/rlinvariant` (or `$RLINVARIANT_CACHE`). Functions take contiguous CPU tensors; shapes are checked by the ops.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rlinvariant.errors import UserError
from rlinvariant.files import cache_dir

SOURCES = tuple(sorted(x for x in Path(__file__).parent.iterdir() if x.suffix in (".c", ".h")))
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
DTYPES = (torch.bfloat16, torch.float32)

_P, _I, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {  # one line per function of kernels/*.c
    "exp_f32": (_P, _P, _I),
    "tanh_f32": (_P, _P, _I),
    "linear": (_P, _P, _P, _P, _I, _I, _I, _B),
    "rms_norm": (_P, _P, _P, _I, _I, _F, _B, _F, _B),
    "rms_norm_backward": (_P, _P, _P, _P, _P, _I, _I, _F, _B, _F, _B),
    "rope": (_P, _P, _P, _P, _I, _I, _I, _I, _F, _B),
    "swiglu": (_P, _P, _P, _I, _B, _B),
    "swiglu_backward": (_P, _P, _P, _P, _P, _I, _B, _B),
    "attention": (*[_P] * 8, *[_I] * 10, _F, _F, _B),
    "attention_backward": (*[_P] * 10, *[_I] * 5, _F, _F, _B),
    "scale_logits": (_P, _P, _I, _F, _F, _B),
    "scale_logits_backward": (_P, _P, _P, _I, _F, _F, _B),
    "token_logprobs": (*[_P] * 7, _I, _I, _B),
    "token_logprobs_backward": (*[_P] * 7, _I, _I, _B),
    "sample": (*[_P] * 8, _I, _I, _B),
    "threshold": (*[_P] * 6, _I, _I, _B),
    "moe_route": (*[_P] * 3, *[_I] * 3, _B, _B),
    "moe_combine": (*[_P] * 3, *[_I] * 3, _B),
    "checksum": (*[_P] * 3, _I, _I, _B),
}


def compiler_problems() -> list[str]:
    """Return one line if the compiler that `library` needs is not there."""
    if shutil.which(name := _compiler()) is not None:
        return []
    return [f"C compiler {name} not found: exact mode on CPU builds kernels/*.c; install gcc, or set CC"]


def _compiler() -> str:
    return os.environ.get("CC", "gcc")


def _found_compiler() -> str:
    for problem in compiler_problems():
        raise UserError(problem)
    return _compiler()


def compile_library(target: Path, flags: tuple[str, ...] = FLAGS) -> None:
    """Compile kernels/*.c to `target`, atomically. Raises RuntimeError with the compiler's words if it fails."""
    compiler = _found_compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        built = Path(tmp, "cpu.so")
        command = [compiler, *flags, "-o", str(built), *(str(x) for x in SOURCES if x.suffix == ".c"), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not build {SOURCES[0].parent}/*.c: {done.stderr.strip()[:2000]}")
        os.replace(built, target)


def load_library(path: Path) -> ctypes.CDLL:
    """Open a built library and declare its functions."""
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """Return the kernels for this processor, which are built on first use."""
    compiler = subprocess.run([_found_compiler(), "--version"], capture_output=True, text=True).stdout
    flags_of_cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "")
    key = "\0".join((*(x.read_text() for x in SOURCES), *FLAGS, compiler, platform.machine(), flags_of_cpu))
    path = cache_dir() / f"cpu-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    if not path.exists():
        compile_library(path)
    return load_library(path)


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of kernels/*.c. Tensors are passed as pointers, and kept alive while it runs."""
    getattr(library(), function)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def is_bf16(tensor: Tensor) -> int:
    """Return 1 for a bfloat16 and 0 for a float32 tensor of any shape. Raises TypeError for anything else."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"expected bfloat16 or float32, got {tensor.dtype}")
    return int(tensor.dtype is torch.bfloat16)
