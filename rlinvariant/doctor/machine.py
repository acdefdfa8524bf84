"""Is this machine able: processor, compiler, GPU, threads, environment variables, accelerate's own configuration?"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlinvariant import runtime
from rlinvariant.conflicts import environment_conflicts, launcher_problems
from rlinvariant.doctor.finding import Finding
from rlinvariant.errors import UserError, one_line
from rlinvariant.files import cache_dir
from rlinvariant.kernels import choice
from rlinvariant.launch import KINDS, shard_variables
from rlinvariant.machine import environment

TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def cpu() -> Iterator[Finding]:
    """Name the processor and the instructions that the kernels look for."""
    about = environment()["cpu"]
    flags = " ".join(flag for flag, present in about["isa"].items() if present)
    yield Finding("cpu", "ok", f"{about['model']}, {about['cores']} cores, {flags or 'none of the flags looked for'}")


def compiler() -> Iterator[Finding]:
    """Build and load kernels/*.c. A GPU needs it too: a module is compared on the CPU with what replaces it."""
    from rlinvariant.kernels import cpu as c

    started = time.monotonic()
    try:
        c.library()
    except UserError as error:
        yield Finding("compiler", "problem", str(error))
    except OSError as error:
        fix = "empty it, or set RLINVARIANT_CACHE to a directory that can be written and from which libraries can be loaded"
        yield Finding("compiler", "problem", f"kernels/*.c: {one_line(error)} in {cache_dir()}; {fix}")
    except RuntimeError as error:
        fix = "install a current gcc, or set CC"
        yield Finding("compiler", "problem", f"kernels/*.c: {one_line(error)}; {fix}")
    else:
        took, name = f"{time.monotonic() - started:.2f} s", os.environ.get("CC", "gcc")
        yield Finding("compiler", "ok", f"{name}: kernels/*.c built and loaded, or found in {cache_dir()}, in {took}")


def gpu(cuda: bool) -> Iterator[Finding]:
    """Name the device that exact mode would run on, and say whether it can."""
    import torch

    from rlinvariant.kernels import attention
    from rlinvariant.support import cuda_problems

    if not cuda:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        hidden = "a GPU is there, but torch does not see it (CUDA_VISIBLE_DEVICES, the driver, or a CPU build of torch)"
        text = f"{hidden if present else 'none'}; exact mode runs on the CPU, in bfloat16 or float32"
        yield Finding("gpu", "note" if present else "ok", text)
        return
    major, minor = torch.cuda.get_device_capability()
    yield Finding("gpu", "ok", f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    if problems := list(cuda_problems(torch.bfloat16)):
        yield from (Finding("exact on gpu", "problem", x) for x in problems)
    else:
        needed = bool(attention.flash_heads()) and choice.chosen() != "chunked"
        yield Finding("exact on gpu", "ok", "bfloat16" + ", FlashAttention-3 is in the vLLM wheel" * needed)


def threads() -> Iterator[Finding]:
    """Look at how many threads torch runs, and whether they spin while they wait."""
    import torch

    policy, asked = os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = (
        f"torch runs {torch.get_num_threads()}, {cores} cores, OMP_WAIT_POLICY={policy}, OMP_NUM_THREADS={asked or '(unset)'}"
    )
    if (policy or "").lower() != "passive":
        spin = "threads that spin make a run up to 10 times slower on shared cores; export OMP_WAIT_POLICY=passive"
        yield Finding("threads", "note", f"{text}: {spin}")
    elif torch.get_num_threads() != cores:
        fix = "unset OMP_NUM_THREADS" if asked else f"export OMP_NUM_THREADS={cores}"
        yield Finding("threads", "note", f"{text}: not all cores are used; {fix}")
    else:
        yield Finding("threads", "ok", text)


def variables(env: Mapping[str, str], cuda: bool) -> Iterator[Finding]:
    """Look for environment variables that exact mode refuses, or that change other numbers of a run."""
    clean, always = True, environment_conflicts(env, "off")
    for line in (*always, *(x for x in environment_conflicts(env, "exact") if x not in always)):
        clean = False
        yield Finding("environment", "problem", line, invariance_off=line not in always)
    for line in choice.misplaced(choice.asked(), "exact", "cuda" if cuda else "cpu"):
        clean = False
        yield Finding("environment", "problem", line, False)
    try:
        runtime.configure()
    except UserError as error:
        clean = False
        yield Finding("environment", "problem", str(error).removeprefix("environment: "), False)
    for name in TF32_VARIABLES if cuda else ():
        if env.get(name, "0") != "0":
            clean = False
            text = f"{name}={env[name]}: float32 products outside the ops are rounded to TF32; run `unset {name}`"
            yield Finding("environment", "note", text)
    if clean:
        yield Finding("environment", "ok", "no variable is in the way")


def accelerate_config(env: Mapping[str, str], cuda: bool) -> Iterator[Finding]:
    """Look at the configuration that `accelerate launch` takes without --config_file."""
    cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(env.get("HF_HOME") or cache).expanduser() / "accelerate"
    path = next((p for p in (folder / "default_config.yaml", folder / "default_config.json") if p.is_file()), None)
    if path is None:
        yield Finding("accelerate", "ok", f"no default configuration in {folder}; configs/ has ours")
        return
    import yaml  # accelerate's own dependency, as it reads this file with it

    otherwise = "or launch with --config_file configs/cpu.yaml (1gpu.yaml)"
    try:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Finding("accelerate", "problem", f"{path}: cannot be read ({one_line(error)}); remove it, {otherwise}", False)
        return
    problems = []
    # YAML reads an unquoted no as false
    if (precision := config.get("mixed_precision")) not in (None, False, "no"):
        problems.append((f"mixed_precision: {precision}: expected 'no': it would switch autocast on", True))
    if (kind := str(config.get("distributed_type", "NO"))) not in KINDS:
        problems.append((f"distributed_type: {kind}: expected {', '.join(KINDS[1:])}", False))
    problems += [(line, False) for line in launcher_problems(shard_variables(config))]
    if config.get("use_cpu") and cuda:
        problems.append(("use_cpu: true: expected false where there is a GPU, which vLLM would take", True))
    for text, off in problems:
        yield Finding("accelerate", "problem", f"{path}: {text}; change it there, {otherwise}", off)
    if not problems:
        yield Finding("accelerate", "ok", f"{path}: nothing in the way")
