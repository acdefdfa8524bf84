"""The hooks in the CUDA wheels of the vLLM that a GPU runs and of the newest one, by their sources alone: `make contract`.

Each wheel is a download of 300 MB, so this is no part of `make test`. Nothing of a wheel is imported or run.
"""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinvariant.sampler.hooks import EITHER, FIELDS, GPU_HOOKS, HOOKS, NAMES
from rlinvariant.support import RELEASES
from tests.trees import parsed

pytestmark = pytest.mark.contract

Function = ast.FunctionDef | ast.AsyncFunctionDef
RELEASED = [*(f"vllm=={release}.*" for release in RELEASES["vllm"]), "vllm"]  # the last: the newest there is


class Wheel:
    """Reads the Python sources of a wheel."""

    def __init__(self, path: Path) -> None:
        self.name, self.files, self.trees = path.name, zipfile.ZipFile(path), {}
        self.known = set(self.files.namelist())

    def tree(self, module: str) -> ast.Module | None:
        if module not in self.trees:
            base = module.replace(".", "/")
            path = next((x for x in (f"{base}.py", f"{base}/__init__.py") if x in self.known), None)
            self.trees[module] = None if path is None else parsed(self.files.read(path))
        return self.trees[module]

    def find(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """Return the module and the node in which a name is defined, through what imports it."""
        if (tree := self.tree(module)) is None or depth > 6:
            return None
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, (ast.ClassDef, *Function.__args__)) and node.name == name:
                return module, node
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
                return module, node
        for node in nodes:
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                source = self._source(module, node)
                if (alias.asname or alias.name) == name and (found := self.find(source, alias.name, depth + 1)):
                    return found
        # what a module makes when it is asked for, as `vllm.platforms.current_platform`
        return next(((module, n) for n in nodes if isinstance(n, ast.Constant) and n.value == name), None)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        package = parts if f"{'/'.join(parts)}/__init__.py" in self.known else parts[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    def function(self, hook: str) -> Function | None:
        """Return the function of a hook, "module:name" or "module:Class.name", also of a base of the class."""
        module, name = hook.split(":")
        owner, _, method = name.rpartition(".")
        found = self.find(module, owner or name)
        if found is None or not owner:
            return found[1] if found and isinstance(found[1], Function) else None
        return self._method(*found, method)

    def fields(self, path: str) -> set[str]:
        """Return the annotated names of a class, "module:Class"."""
        found = self.find(*path.split(":"))
        body = found[1].body if found and isinstance(found[1], ast.ClassDef) else []
        return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}

    def _method(self, module: str, owner: ast.AST, name: str) -> Function | None:
        if not isinstance(owner, ast.ClassDef):
            return None
        for node in owner.body:
            if isinstance(node, Function) and node.name == name:
                return node
        for base in owner.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and (method := self._method(*found, name)):
                return method
        return None


def parameters(function: Function) -> tuple[str, ...]:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    bound = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in function.decorator_list)
    return tuple(names[1:] if bound else names)


@pytest.fixture(scope="module", params=RELEASED)
def wheel(request, tmp_path_factory) -> Iterator[Wheel]:
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(directory), request.param], check=True)
    (path,) = directory.glob("*.whl")
    yield Wheel(path)
    path.unlink()


def test_every_hook_is_there_with_the_parameters_that_are_used(wheel):
    wrong = {}
    for hook, expected in {**HOOKS, **GPU_HOOKS}.items():
        function = wheel.function(hook)
        if function is None or parameters(function)[: len(expected)] != expected:
            wrong[hook] = "missing" if function is None else parameters(function)
    assert not wrong, f"{wheel.name}: {wrong}"


def test_a_release_asks_for_attention_by_one_of_the_hooks(wheel):
    for hooks in EITHER:
        assert sum(wheel.function(hook) is not None for hook in hooks) == 1, f"{wheel.name}: {hooks}"


def test_every_name_is_there(wheel):
    assert not [name for name in NAMES if wheel.find(*name.split(":")) is None], wheel.name


def test_every_field_is_there(wheel):
    assert not {path: missing for path, names in FIELDS.items() if (missing := {*names} - wheel.fields(path))}, wheel.name


def test_a_hook_that_is_not_there_is_found(wheel):
    """Control."""
    assert wheel.fields("vllm.v1.attention.backend:CommonAttentionMetadatas") == set()
    assert "seq_lens_of_old" not in wheel.fields("vllm.v1.attention.backend:CommonAttentionMetadata")
    assert wheel.function("vllm.v1.sample.sampler:Sampler.backward") is None
    assert wheel.function("vllm.v1.sample.samplers:Sampler.forward") is None
    assert wheel.find("vllm.v1.outputs", "NoSuchName") is None
    assert parameters(wheel.function("vllm.v1.sample.sampler:Sampler.forward"))[:2] == ("self", "logits")
