"""README, CONTRIBUTING and docs/ say what is true of the tree: links, commands, keys, generated pages, the figure."""

import importlib
import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from rlinvariant import cli, keys, launch, run, train
from rlinvariant.ablate.plan import read as read_ablation
from rlinvariant.bench import drift
from rlinvariant.config.check import check
from rlinvariant.config.parse import Draft, draft
from rlinvariant.errors import UserError
from rlinvariant.report.stats import ACCURACY
from rlinvariant.trainer.preflight import check_start

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


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    """Return the lines in the code blocks of a text, fenced or indented, that call a command, each with its arguments."""
    blocks = "\n".join([*FENCE.findall(text), *re.findall(r"^    .*$", FENCE.sub("", text), re.MULTILINE)])
    joined = re.sub(r"\\\n\s*", "", blocks)
    lines = re.findall(r"^(?:    |\$ )?(rlinvariant [a-z].*)$", joined, re.MULTILINE)
    split = [shlex.split(re.sub(r"\b[A-Z]\b", "1", line), comments=True)[1:] for line in lines]  # K, N: a number
    return [(line, words[: words.index("&")] if "&" in words else words) for line, words in zip(lines, split, strict=True)]


def misused(text: str) -> list[str]:
    """Return the command lines of a text that the command's parser refuses."""
    found = []
    for line, (name, *rest) in command_lines(text):
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


READER = r"(model|data\.path|reward|tools|environment|recipe|config|sampler\.trainer_token_file)"
ABSENT = re.compile(rf"{READER}=.*(no such|cannot be read|unknown recipe|does not answer)|.*( to be installed| the 1 process )")
"""Matches what is said of a file, a model, a name, a package or a second process that a reader has, and a test has not."""


def drafts(name: str, arguments: list[str]) -> Iterator[tuple[Draft, dict[str, str]]]:
    """Yield what the arguments of `train` mean, or of each arm of `ablate`, beside the environment of its processes."""
    if name == "ablate":
        planned = read_ablation(arguments)
        yield from ((draft(planned.arguments(arm, 0)), {**os.environ}) for arm in planned.arms)
    elif name == "train" and not {"-h", "--help", "--help=all"} & {*arguments}:
        machine, settings = train.split(arguments)
        yield draft(settings), os.environ | launch.variables(machine)


def refused(text: str) -> list[str]:
    """Return what the configuration's checks, and those of a recipe's own model, refuse of the command lines of a text."""
    said: list[str] = []
    for _, (name, *arguments) in command_lines(text):
        for read, env in drafts(name, arguments):
            said += read.errors + check(read.config, env, read.recipe)
        if name == "train" and not said and read.config.model is None and not read.config.sampler.servers:
            said += of_own_model(tuple(argument for argument in arguments if not argument.startswith(("run=", "machine="))))
    return [line for line in said if not ABSENT.match(line)]


@cache
def of_own_model(settings: tuple[str, ...]) -> list[str]:
    """Return what is refused of the model that a recipe makes itself, as one process with these settings sees it."""
    read = draft(settings)
    if read.recipe is None or read.recipe.untrained is None:
        return []
    try:
        with run.saved_untrained(read.config, read.recipe) as model:
            check_start(run.looked_at(read.config, read.config.grpo_config(), read.recipe, model).start)
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_line_asks_for_what_is_refused(page):
    assert refused(page.read_text()) == []


def test_a_command_line_that_is_refused_is_seen():
    """Each of them: the parser, the checks of a configuration, those of an arm, those of a recipe's own model."""
    wrong = [
        "train recipe=arithmetic stpes=2",
        "train recipe=arithmetic algorithm=ppo trainer.loss_type=grpo",
        "ablate recipe=arithmetic trainer.beta=0.1 seeds=2 arms=exact,exact-top-p-0.9",
        "train recipe=arithmetic lora.r=4096",
    ]
    for line in wrong:
        assert refused(f"    rlinvariant {line}  # wrong\n"), line
    assert refused("```\nrlinvariant train recipe=arithmetic \\\n  lora.r=4\n```") == []


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
    drawn = script("drift")
    assert drawn.FIGURE.read_text() == drawn.figure()


def ours(page: str) -> list[str]:
    """Return the lines of a generated page but for TRL's own fields, whose words change with its releases."""
    return [line for line in page.splitlines() if not line.startswith("| `trainer.")]


def test_generated_pages_are_those_that_the_code_generates(monkeypatch):
    generate = script("generate")
    monkeypatch.setenv("COLUMNS", "")  # which it sets: taken back afterwards
    stale = [str(path.relative_to(ROOT)) for path, text in generate.pages().items() if ours(path.read_text()) != ours(text)]
    assert stale == [], "run: python docs/generate.py"


def test_the_readme_opens_with_the_numbers_of_the_evidence():
    content = json.loads((ROOT / "rlinvariant/bench/results/h200/drift.json").read_text())
    opening = (ROOT / "README.md").read_text().partition("**Why.**")[0]
    for arm in drift.study_of(content).arms:
        (line,) = [line for line in opening.splitlines() if line.startswith(f"| `{arm.name}`")]
        differing, compared = (sum(row[f"onpolicy/{name}_tokens"] for row in arm.rows) for name in ("mismatched", "compared"))
        least = min(row["onpolicy/is_ratio/min"] for row in arm.rows)
        greatest = max(row["onpolicy/is_ratio/max"] for row in arm.rows)
        held = arm.estimate(ACCURACY)
        ratios = "1 … 1" if least == greatest == 1 else f"{least:.3f} … {greatest:.3f}"
        assert f"{differing:,}{'**' * (not differing)} / {compared:,} | {ratios} |" in line, line
        assert f"33.3 -> {100 * held.mean:.1f} ± {100 * (held.high - held.mean):.1f}" in line, line


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
