"""README, CONTRIBUTING and docs/ say what is true of the tree: links, commands, keys, generated pages, the figure."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from rlinvariant import cli, keys
from rlinvariant.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "recipes/README.md"])
LINK = re.compile(r"(?<!`)\[[^]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
COMMANDS = {"help", *(command.name for command in cli.COMMANDS)}


def script(name: str) -> ModuleType:
    """Import docs/NAME.py, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and mkdocs give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w\- ]", "", heading.lower()).strip()) for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or part and part not in anchors(file.read_text()):
            found.append(target)
    return found


def unknown_commands(text: str) -> list[str]:
    """Return the `rlinvariant COMMAND` of a text whose command does not exist."""
    named = re.findall(r"^(?:\$ |\.venv/bin/)?rlinvariant ([a-z]\w*)", text, re.MULTILINE)
    named += re.findall(r"`(?:\.venv/bin/)?rlinvariant ([a-z]\w*)", text)
    return [name for name in named if name not in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_exist(page):
    text = page.read_text()
    assert broken_links(page, text) == []
    assert unknown_commands(text) == []


def test_a_broken_link_and_an_unknown_command_are_seen():
    readme = ROOT / "README.md"
    assert broken_links(readme, "[a](docs/nothing.md) [b](docs/log.md#nothing) [c](docs/log.md) [d](https://x.y)") == [
        "docs/nothing.md",
        "docs/log.md#nothing",
    ]
    assert unknown_commands("```\nrlinvariant verfy M\nrlinvariant verify M\n```\nand `rlinvariant trian`") == [
        "verfy",
        "trian",
    ]


def misused(text: str) -> list[str]:
    """Return the command lines in the code blocks of a text that the command's parser refuses."""
    found = []
    for line in re.findall(r"^(?:\$ )?(rlinvariant [a-z].*)$", "".join(FENCE.findall(text)), re.MULTILINE):
        name, *rest = shlex.split(re.sub(r"\b[A-Z]\b", "1", line), comments=True)[1:]  # K, N: a number
        module = importlib.import_module({c.name: c.module for c in cli.COMMANDS}[name])
        try:
            options, others = cli.build_parser(name, module).parse_known_args([name, *rest])
        except UserError:
            found.append(line)
            continue
        if others and not hasattr(options, "settings"):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_those_that_the_commands_take(page):
    assert misused(page.read_text()) == []


def test_a_misused_command_is_seen():
    wrong = ["rlinvariant replay RUN --step K --stpe 2", "rlinvariant report", "rlinvariant verify M --tokens many"]
    assert misused("\n".join(["```", *wrong, "rlinvariant replay RUN --step K  # right", "```"])) == wrong


def test_settings_and_recipes_that_are_named_exist():
    known = (ROOT / "docs/reference/config.md").read_text()
    recipes = {path.stem for path in (ROOT / "recipes").glob("[a-z]*.py")}
    for page in PAGES:
        text = page.read_text()
        keys = set(re.findall(r"(?<![\w./])((?:trainer|ppo|sampler|wandb)\.[a-z_]+)(?==|`)", text))
        assert {key for key in keys if f"`{key}`" not in known} == set(), page
        named = set(re.findall(r"\brecipe=([a-z_0-9]+)\b(?!\.py)", text))
        assert named <= recipes, page


def test_the_metrics_page_has_every_key_and_no_other():
    page = (ROOT / "docs/reference/metrics.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` \|(.*)\|$", page, re.MULTILINE)
    assert sorted(key for key, _ in rows) == sorted(keys.keys(*keys.SECTIONS))
    assert all(len(cells.split("|")) == 3 and all(cell.strip() for cell in cells.split("|")) for _, cells in rows)


def test_the_figure_is_drawn_from_the_recorded_runs():
    drift = script("drift")
    assert drift.FIGURE.read_text() == drift.figure()


def ours(page: str) -> list[str]:
    """Return the lines of a generated page but for TRL's own fields, whose words change with its releases."""
    return [line for line in page.splitlines() if not line.startswith("| `trainer.")]


def test_generated_pages_are_those_that_the_code_generates(monkeypatch):
    generate = script("generate")
    monkeypatch.setenv("COLUMNS", "")  # which it sets: taken back afterwards
    stale = [str(path.relative_to(ROOT)) for path, text in generate.pages().items() if ours(path.read_text()) != ours(text)]
    assert stale == [], "run: python docs/generate.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = set(re.findall(r"[\w./-]+\.md", nav))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES if (ROOT / "docs") in page.parents}


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([\w.-]+)", page.read_text(), re.MULTILINE)}
    assert named <= targets


def test_files_that_are_named_exist():
    """Paths in backticks that begin with a folder of this repository."""
    path = re.compile(r"`((?:rlinvariant|recipes|configs|notebooks|tests|docs|examples)/[\w./-]*[\w/])`")
    named = {(page, name) for page in PAGES for name in path.findall(page.read_text()) if "NAME" not in name}
    assert [f"{page.relative_to(ROOT)}: {name}" for page, name in sorted(named) if not (ROOT / name).exists()] == []
