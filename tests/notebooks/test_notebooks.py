"""Every notebook runs from its first cell to its last, and then says again what its committed outputs say."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SAYS = {
    "01_why_logprobs_differ": (r"^ours:  no difference in any bit$",),
    "02_from_one_bit_to_a_wrong_gradient": (
        r"^ours   ratio after 512 tokens: 1 to 1$",
        r"^ours: mismatched 0 / 4,096$",
        r"^mismatched 1 / 4,096\nsequence 5, position 300: ",
    ),
    "03_read_a_run": (
        r"^exact: report.html.*\n(?: .*\n)*  .*mismatched 0 / 40,279 tokens, coverage 1$",
        r"^[\d,]+ fp32 values apart$",
    ),
    "04_bring_your_own": (
        r"^reward 0\.0\d+ -> 0\.[3-9]\d+\nmismatched 0 / \d\d,\d+, coverage 1$",
        r"^top_p=1\.9: expected more than 0",
        r"hidden_act=gelu",
    ),
}


def outputs(notebook, kind: str = "stdout") -> str:
    cells = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in cells if o.output_type == "stream" and o.name == kind)


def pictures(notebook) -> list[int]:
    """Count the pictures that each cell makes."""
    return [sum("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) for cell in notebook.cells]


def test_every_notebook_is_tested():
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == sorted(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    committed = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    executed = nbformat.from_dict(committed)
    before = {path: path.stat().st_mtime_ns for path in NOTEBOOKS.rglob("*") if "__pycache__" not in path.parts}
    expected = pictures(committed)
    # By sockets in files: a port that is free now can be taken when the kernel comes to it
    config = Config(KernelManager={"transport": "ipc", "ip": str(tmp_path / "kernel")})
    how: dict[str, Any] = {"config": config, "timeout": 550, "startup_timeout": 550}
    NotebookClient(executed, resources={"metadata": {"path": str(NOTEBOOKS)}}, **how).execute()  # raises what a cell raises
    for says in SAYS[name]:
        assert re.search(says, outputs(executed), re.M), f"{says} not in {outputs(executed)}"
    assert pictures(executed) == expected and sum(expected) > 0
    assert not outputs(executed, "stderr")
    assert before == {path: path.stat().st_mtime_ns for path in NOTEBOOKS.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_committed_was_executed_and_is_small(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(o.output_type == "error" for cell in code for o in cell.outputs)
    text = outputs(notebook)
    assert all(re.search(says, text, re.M) for says in SAYS[name])
    assert not outputs(notebook, "stderr")
    assert not re.search(r"/(work|home|root|tmp|usr)/|site-packages", text)
    for link in re.findall(r"\]\(([^)#]+)\)", "".join(c.source for c in notebook.cells if c.cell_type == "markdown")):
        assert link.startswith("https://") or (NOTEBOOKS / link).exists(), link
