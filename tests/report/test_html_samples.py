"""The page's completions: chosen evenly, bounded, harmless, and found by a reader who searches and sorts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from rlinvariant.report import completions, html, html_samples
from rlinvariant.report.study import load
from tests.report.browser import Browser
from tests.report.pages import HOSTILE, text_of
from tests.report.runs import write_ablation, write_run
from tests.report.said import said

# What a reader would do, and what is then seen
PROBE = """(async () => {
const labels = [...document.querySelectorAll("#said label")];
const control = Object.fromEntries(labels.map((label) => [label.firstChild.data.trim(), label.lastChild]));
const cards = () => [...document.querySelectorAll("div.said")].map((card) => card.innerText);
const set = async (name, value) => { const c = control[name];
  if (c.type === "checkbox") c.checked = value; else c.value = value;
  c.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 0)); };
const seen = {title: document.title, start: cards(), beside: document.querySelectorAll(".beside").length};
await set("step", 0); seen.first = cards();
await set("all steps", true); seen.all = cards();
await set("sort by", "reward"); seen.best = cards();
await set("order", "lowest first"); seen.worst = cards();
await set("search", "sample 3"); seen.search = cards();
await set("search", "/sample [34]$/"); seen.regex = cards();
await set("search", "/(/"); seen.wrong = [cards().length, control.search.validationMessage];
await set("search", "");
const seenOf = (span) => [span.textContent, span.title, span.style.backgroundColor];
const tokens = () => [...document.querySelector("div.said pre").children].map(seenOf);
await set("colour tokens by", "log-prob"); seen.tokens = tokens();
await set("sort by", "prompt"); await set("colour tokens by", "difference"); seen.differ = tokens();
seen.choices = [...control["colour tokens by"].options].filter((of) => !of.disabled).map((of) => of.value);
await set("as", "table"); await set("all steps", false);
const rows = () => [...document.querySelectorAll(".said-table tbody tr")];
const cells = () => rows().map((row) => [...row.cells].map((cell) => cell.innerText));
seen.table = cells();
const head = (name) => [...document.querySelectorAll(".said-table th button")].find((b) => b.textContent.startsWith(name));
head("length").click(); await set("step", control.step.value); seen.longest = cells();
seen.sorted = document.querySelector("[aria-sort]").innerText + document.querySelector("[aria-sort]").getAttribute("aria-sort");
seen.wide = document.documentElement.scrollWidth - innerWidth;
return seen;
})()"""


def data_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="said-data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def write_tokenizer(path: Path, pieces: list[str], place: str = "checkpoints/checkpoint-3") -> None:
    """Give a run a checkpoint's tokenizer of these tokens, or one of its model at the end."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[-1]))
    tokenizer.decoder = decoders.Fuse()
    (path / place).mkdir(parents=True)
    tokenizer.save(str(path / place / "tokenizer.json"))


def probed(chromium: Browser, run: Path, width: int = 1280) -> dict[str, Any]:
    """Return what PROBE has seen of a run's page in the browser."""
    chromium.open(html.write(run)[0], width)
    return chromium.run(PROBE)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three steps, the last with hostile texts, and a tokenizer whose token 0 is `sa`, 1 `mple`, ..."""
    path = write_run(tmp_path / "run", 0).path
    write_tokenizer(path, ["sa", "mple", " ", "0", "1", "2", "3", "4", "5", "6", "7"])
    for step in (1, 2, 3):
        rows = said(step)
        for i, row in enumerate(rows):
            row["token_ids"], row["sampler_logprobs"] = [0, 1, 2, 3 + i], [-0.1, -0.2, -4.0, -0.5 * i]
            if i == 0:
                row["trainer_logprobs"], row["mismatched_tokens"] = [-0.1, -0.7, -4.0, 0.0], 1
        completions.write(path, rows if step < 3 else [*rows[:-1], rows[-1] | {"completion": HOSTILE, "prompt": HOSTILE}])
    return path


@pytest.mark.parametrize("width", [420, 1280])
def test_a_reader_searches_sorts_and_sees_groups_and_tokens(run, chromium, width):
    seen = probed(chromium, run, width)
    assert "pwned" not in seen["title"] and any("<script>" in card for card in seen["start"])
    assert len(seen["start"]) == 8 and seen["beside"] == 3 and "step 3 #0" in seen["start"][0]
    assert all("step 1" in card for card in seen["first"]) and len(seen["all"]) == 24
    rewards = [[float(re.search(r"reward (\S+)", card)[1]) for card in seen[name]] for name in ("best", "worst")]  # pyright: ignore
    assert rewards[0] == sorted(rewards[0], reverse=True) and rewards[1] == sorted(rewards[1])
    assert len(seen["search"]) == 3 and all("sample 3" in card for card in seen["search"])
    assert len(seen["regex"]) == 6 and seen["wrong"] == [6, "not a regular expression"]
    texts, titles, colours = zip(*seen["tokens"], strict=True)
    assert texts == ("sa", "mple", " ", "0") and titles[2] == "log-prob -4.0"
    assert len(set(colours)) == 4, "each token as its log-prob"
    assert seen["choices"] == ["nothing", "log-prob", "difference"]
    assert [bool(colour) for _, _, colour in seen["differ"]] == [False, True, False, False], "the token that differs alone"
    assert "the trainer's differs by -0.5" in seen["differ"][1][1]
    assert len(seen["table"]) == 8 and seen["table"][0][:3] == ["1", "0", "0.000"] and seen["table"][0][-1] == "sample 0"
    lengths = [int(row[4].split(",")[0]) for row in seen["longest"]]
    assert lengths == sorted(lengths, reverse=True) and seen["sorted"] == "length ▼descending" and seen["wide"] <= 0


def test_a_token_after_an_emoji_is_coloured_whole(tmp_path, chromium):
    """JavaScript counts an emoji as two."""
    path, pieces = write_run(tmp_path / "run", 0).path, ["🙂🙈", "sa", "\u200d", "é", "mple"]
    write_tokenizer(path, pieces)
    more = {"completion": "".join(pieces), "token_ids": [0, 1, 2, 3, 4], "sampler_logprobs": [-0.1 * i for i in range(5)]}
    completions.write(path, [row | more for row in said(1)])
    assert [text for text, _, _ in probed(chromium, path)["tokens"]] == ["🙂🙈", "sa", "\\u200d", "é", "mple"]


def test_a_log_prob_that_is_no_number_is_coloured_as_the_least(run):
    infinite = np.full(2, -np.inf, np.float32)
    completions.write(run, said(4, groups=1, size=1, completion="sample", token_ids=[0, 1], sampler_logprobs=infinite))
    assert data_of(html_samples.section(load(run)))[0]["steps"][-1]["rows"][0]["q"] == [-99, -99]


def test_without_a_tokenizer_or_with_another_there_are_no_colours(run):
    assert "q" in data_of(html.write(run)[0].read_text())[0]["steps"][0]["rows"][0], "control"
    file = run / "checkpoints" / "checkpoint-3" / "tokenizer.json"
    for content in (file.read_text().replace("mple", "mpel"), "{}", None):
        file.write_text(content) if content is not None else file.unlink()
        assert "q" not in data_of(html.write(run)[0].read_text())[0]["steps"][0]["rows"][0]
    write_tokenizer(run, ["sa", "mple", " ", "0", "1", "2", "3", "4", "5", "6", "7"], "model")  # without checkpoints: its end
    assert "q" in data_of(html.write(run)[0].read_text())[0]["steps"][0]["rows"][0]


def test_a_large_run_has_a_bounded_page_that_says_what_it_leaves_out(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", 0).path
    small = len(html.write(path)[0].read_text())
    monkeypatch.setattr(html_samples, "BYTES", 800_000)
    monkeypatch.setattr(html_samples, "ROWS", 64)
    for step in range(1, 61):
        completions.write(path, said(step, groups=25, completion="x" * 1500))
    page = html.write(path)[0].read_text()
    (data,) = data_of(page)
    steps = [of["step"] for of in data["steps"]]
    assert len(page) < small + 1.1 * html_samples.BYTES and 5 <= len(steps) < 40
    assert steps[0] == 1 and steps[-1] == 60 and max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 16
    assert data["said"].startswith(f"On this page: {len(steps)} steps of 60 that drew completions, at most 64 of 100 ")
    monkeypatch.setattr(html_samples, "BYTES", 10**9)
    monkeypatch.setattr(html_samples, "STEPS", 10**9)
    assert len(data_of(html.write(path)[0].read_text())[0]["steps"]) == 60, "control"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_steps_are_spread_and_none_is_lost(count):
    order = html_samples._spread(list(range(count)))
    assert sorted(order) == list(range(count)) and order[0] == count - 1 and order[-1] != 0 or count < 3


def test_a_part_of_a_step_is_whole_groups_with_the_best_and_the_worst():
    rows = said(1, groups=40, size=8)
    rows[300]["reward"], rows[200]["reward"] = 9.0, -9.0
    chosen = html_samples._groups(rows)
    assert len(chosen) == html_samples.ROWS == 128 and {200, 300} <= {row["sample_id"] for row in chosen}
    groups = [row["group"] for row in chosen]
    assert all(groups.count(group) == 8 for group in groups)


def test_an_arm_shows_the_best_of_its_last_step_however_few_there_are(tmp_path):
    path = write_ablation(tmp_path / "ablation-a", seeds=[0], steps=1)
    for arm in path.glob("*/seed-0"):
        for step in (1, 2):
            completions.write(arm, said(step, groups=1, size=2))
    shown = text_of(html.write(path)[0].read_text())
    assert shown.count("seed 0, step 2, reward") == len(list(path.glob("*/seed-0"))) and "seed 0, step 1, reward" not in shown


def test_a_damaged_file_is_named_and_an_ablation_shows_each_arm(tmp_path):
    path = write_ablation(tmp_path / "ablation-a", seeds=[0], steps=2)
    completions.files(path / "drift" / "seed-0")[1].write_bytes(b"")
    page = html.write(path)[0].read_text()
    assert "drift/seed-0/completions/step-000001.parquet: damaged" in text_of(page)
    assert [run["name"] for run in data_of(page)] == ["exact, seed 0"]
