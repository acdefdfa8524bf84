"""Imports point one way, each heavy dependency has one importer, and importing changes nothing."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trees import parsed

ROOT = Path(__file__).parents[1]
# A unit imports itself and units of rows above its own: sampler and trainer, on one row, never each other.
ROWS = (
    {"types"},
    {"keys", "text"},
    {"deadline", "errors", "forks"},
    {"arguments", "files", "held_out", "hub", "install", "machine", "masking", "reading", "stopping", "trainer_token"},
    {"bits", "rollout", "runtime", "checkpoints", "lock", "peers"},
    {"kernels"},
    {"ops", "checksums"},
    {"models", "metrics", "conflicts", "support", "launch"},
    {"rewards", "cache", "gradients"},
    {"tools"},
    {"model_source"},
    {"config"},
    {"sampler", "trainer"},
    {"report"},
    {"warmstart", "verification", "resumption"},
    {"plan", "journal", "publish"},
    {"run"},
    {"script"},
    {"api"},
    {"recipes"},
    {"bench", "serve", "bisect", "replay", "merge"},
    {"demo", "ablate", "doctor"},
    {"__init__"},
    {"cli"},
    {"__main__"},
    {"train"},
    {"resume"},
    {"evaluation"},
)
LEVEL = {unit: level for level, row in enumerate(ROWS) for unit in row}
IMPORTERS = {
    "triton": {"kernels"},
    "vllm": {"sampler", "kernels", "bench"},  # kernels: its build of FlashAttention-3; bench: what ours is measured against
    "trl": {"trainer", "config", "bench"},
    "accelerate": {"trainer", "config", "launch"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package and of what uses it, with its unit: the part of the package that it is in."""
    for path in sorted((ROOT / "rlinvariant").rglob("*.py")):
        yield path.relative_to(ROOT / "rlinvariant").with_suffix("").parts[0], path
    for path in (ROOT / "train.py", *sorted((ROOT / "recipes").rglob("*.py"))):
        if path.exists():
            yield "train" if path.stem == "train" else "recipes", path


def imported(source: str, package: str, types: bool = True) -> set[str]:
    """Full names that a source imports, inside functions too; `package` is what a relative import starts from.

    types: also what is imported for types alone, which loads nothing.
    """
    names: set[str] = set()
    tree = parsed(source)
    unseen = {
        id(x) for node in ast.walk(tree) if not types and _is_for_types(node) for part in node.body for x in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                names.add(str(first.value))
    return names


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(unit: str, source: str, package: str) -> list[str]:
    if unit not in LEVEL:
        return [f"{unit} has no row in ROWS: say what may import it"]
    found = []
    loaded = imported(source, package, types=False)
    for name in sorted(imported(source, package)):
        top, *rest = name.split(".")
        if name in loaded and top in IMPORTERS and unit not in IMPORTERS[top]:
            found.append(f"{unit} imports {name}, which only {' and '.join(sorted(IMPORTERS[top]))} may")
        if top == "rlinvariant":
            target = rest[0] if rest and rest[0] in LEVEL else "__init__"
            if target != unit and LEVEL[target] >= LEVEL[unit]:
                found.append(f"{unit} imports {name}, which is not below it")
    return found


def test_imports_point_one_way():
    found = []
    for unit, path in modules():
        package = ".".join(path.relative_to(ROOT).parent.parts)
        found += [f"{path.relative_to(ROOT)}: {line}" for line in violations(unit, path.read_text(), package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("unit", "source", "package"),
    [
        ("bits", "import rlinvariant.metrics", "rlinvariant"),
        ("bits", "from rlinvariant import metrics", "rlinvariant"),
        ("bits", "from . import metrics", "rlinvariant"),
        ("bits", "from rlinvariant import make_invariant", "rlinvariant"),  # a name of the package: imports all of it
        ("sampler", "from rlinvariant.trainer.grpo import Trainer", "rlinvariant.sampler"),
        ("trainer", "from ..sampler import Sampler", "rlinvariant.trainer"),
        ("trainer", "def f():\n    from rlinvariant.report import console", "rlinvariant.trainer"),
        ("config", "from rlinvariant.recipes import arithmetic", "rlinvariant"),
        ("models", "import vllm.config", "rlinvariant.models"),
        ("ops", "import triton", "rlinvariant.ops"),
        ("report", "import importlib\nimportlib.import_module('trl')", "rlinvariant.report"),
        ("recipes", "from accelerate import PartialState", "recipes"),
        ("novelty", "import torch", "rlinvariant"),
        ("run", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import trl", "rlinvariant"),
        ("run", "if TYPE_CHECKING:\n    from rlinvariant.cli import main", "rlinvariant"),
    ],
)
def test_a_planted_violation_is_found(unit, source, package):
    assert len(violations(unit, source, package)) == 1


@pytest.mark.parametrize(
    ("unit", "source", "package"),
    [
        ("metrics", "from rlinvariant import bits", "rlinvariant"),
        ("report", "from rlinvariant.metrics import KEYS", "rlinvariant.report"),
        ("trainer", "from .loss import x\nfrom . import loss\nimport trl, accelerate", "rlinvariant.trainer"),
        ("sampler", "from ..rollout import Completion\nimport vllm", "rlinvariant.sampler"),
        ("run", "if TYPE_CHECKING:\n    from trl import GRPOConfig", "rlinvariant"),
        ("train", "from rlinvariant.run import run\nfrom recipes import arithmetic", ""),
    ],
)
def test_what_is_allowed_passes(unit, source, package):
    assert violations(unit, source, package) == []


# What a module imports first is not ours to judge, so the state is taken after that.
STATE = """
import importlib, json, os, random, sys
import numpy, torch

def state():
    return {
        "environ": dict(os.environ),
        "path": list(sys.path),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "rng": (torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "cuda": torch.cuda.is_initialized(),
        "distributed": torch.distributed.is_initialized(),
        "vllm": "vllm" in sys.modules,
    }

def change(module, planted):
    if module == "rlinvariant.config":
        import accelerate, chz, datasets, transformers
        from trl import GRPOConfig
    before = state()
    exec(planted)
    importlib.import_module(module)
    after = state()
    print([key for key in before if before[key] != after[key]], after["cuda"], after["vllm"], flush=True)

for line in sys.stdin:  # each in a fork, which has imported torch alone
    if os.fork() == 0:
        change(*json.loads(line))
        os._exit(0)
    os.wait()
    print("end", flush=True)
"""


@pytest.fixture(scope="module")
def state_change() -> Iterator[Callable[..., str]]:
    """Return a function that tells what changes when a module is imported."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", STATE], cwd=ROOT, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def change(module: str, planted: str = "") -> str:
            print(json.dumps([module, planted]), file=process.stdin)
            return "".join(iter(process.stdout.readline, "end\n")).strip()

        yield change
        process.stdin.close()


@pytest.mark.parametrize("module", ["", ".bits", ".rollout", ".metrics", ".config"])
def test_importing_changes_nothing(module, state_change):
    assert state_change("rlinvariant" + module) == "[] False False"


FIRST = """
import os, sys
class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("TORCH_CPP_LOG_LEVEL"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
"""


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ("from rlinvariant import GRPOConfig, GRPOTrainer", "ERROR passive"),
        ("import rlinvariant; rlinvariant.grpo_trainer", "ERROR passive"),
        ("import torch", "None None"),  # the control
    ],
)
def test_what_torch_reads_when_it_is_imported_is_set_before(imports, found, monkeypatch):
    """vLLM's line about NUMA nodes, in every script, is silenced by a variable that torch reads once."""
    for name in ("TORCH_CPP_LOG_LEVEL", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    result = subprocess.run([sys.executable, "-c", FIRST + imports], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == found, result.stderr


@pytest.mark.parametrize(("first", "late"), [("torch", True), ("rlinvariant.runtime", False)])
def test_a_script_that_imports_torch_first_is_told_what_it_costs(first, late, monkeypatch):
    for name in ("TORCH_CPP_LOG_LEVEL", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = f"import {first}; import rlinvariant; rlinvariant.UserError; print(*rlinvariant.runtime.late_notes())"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout
    assert said.startswith("torch was imported before rlinvariant: ") if late else said == "\n"


@pytest.mark.parametrize(
    ("planted", "key"),
    [
        ("os.environ['A'] = '1'", "environ"),
        ("torch.set_num_threads(torch.get_num_threads() + 1)", "threads"),
        ("torch.manual_seed(0); torch.rand(1)", "rng"),
        ("torch.set_default_dtype(torch.float64)", "dtype"),
    ],
)
def test_a_planted_change_is_found(planted, key, state_change):
    assert state_change("rlinvariant.rollout", planted) == f"['{key}'] False False"
