"""docs/concepts: every file and every test that a page names exists, and every source of drift has both."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.trees import parsed

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "concepts").glob("*.md"))
NAMED = re.compile(r"`((?:rlinvariant|tests|examples|recipes|docs|configs)/[\w./-]*)(?:::(\w+))?`")
HEADER = "| source | what changes | our fix | file | test |"


@cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in parsed(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def missing(text: str) -> list[str]:
    """Return what a text names in backticks as a file, a directory or a test, and is not there."""
    found = []
    for name, test in NAMED.findall(text):
        path = ROOT / name
        if not path.exists() or (test and test not in functions_of(path)):
            found.append(f"{name}::{test}" if test else name)
    return found


def rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of the tables of sources."""
    lines, found = text.splitlines(), []
    for at in (i for i, line in enumerate(lines) if line == HEADER):
        for line in lines[at + 2 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_test_that_a_page_names_exists(page):
    assert missing(page.read_text()) == []


def test_every_source_of_drift_names_a_file_and_a_test():
    found = rows((ROOT / "docs" / "concepts" / "sources-of-drift.md").read_text())
    assert len(found) >= 50
    for row in found:
        assert len(row) == 5 and all(row), row
        source, _, _, file, test = row
        assert any(name.startswith("rlinvariant/") for name, _ in NAMED.findall(file)), f"{source}: no file"
        assert all(name.startswith("tests/") and function for name, function in NAMED.findall(test)), f"{source}: {test}"
        assert NAMED.search(test), f"{source}: no test"


@pytest.mark.parametrize(
    "text", ["`rlinvariant/nothing.py`", "`tests/test_bits.py::test_nothing`", "`tests/nothing.py::test_x`"]
)
def test_a_name_that_does_not_exist_is_found(text):
    assert missing(f"see {text} and `rlinvariant/bits.py`") == [text.strip("`")]
