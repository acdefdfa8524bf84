"""The explanation: its arithmetic is numpy's and torch's to the bit, its parts move, and it needs no network."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinvariant.report import html_explain
from tests.report.browser import Browser

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    0.1,
    0.3,
    1e8,
    16777216.0,
    16777217.0,
    1e-40,
    -1e-45,
    3.4e38,
    1e39,
    -1e39,
    65504.0,
    1 / 3,
    0.00390625,
]


@pytest.fixture
def opened(chromium, tmp_path) -> Browser:
    file = tmp_path / "explain.html"
    file.write_text(html_explain.page())
    chromium.open(file)
    return chromium


def words32(values: np.ndarray) -> list[str]:
    return [f"{x:08X}" for x in np.asarray(values, np.float32).view(np.uint32).tolist()]


def test_its_numbers_are_those_of_numpy_and_torch(opened):
    """Each word of fp32 and bf16 is theirs: a number, a sum of two, of three in both orders; thousands, and the odd ones."""
    random = np.random.default_rng(0)
    drawn = random.standard_normal(3000) * 10.0 ** random.integers(-12, 12, 3000)
    near_ties = np.float32(random.standard_normal(1000)).view(np.uint32) & 0xFFFF0000 | 0x8000  # half way between two of bf16
    numbers = np.concatenate([SPECIAL, drawn, near_ties.view(np.float32).astype(float)])[: 3 * 1300].reshape(3, -1)
    a, b, c = numbers
    script = """([as, bs, cs]) => ["fp32", "bf16"].map((format) => as.map((_, i) => {
      const [a, b, c] = [as[i], bs[i], cs[i]].map(explain[format]), add = (x, y) => explain.add(format, x, y);
      return [a, b, c, add(a, b), add(add(a, b), c), add(a, add(b, c))].map((x) => explain.word(format, x)); }))"""
    found = opened.run(f"({script})({json.dumps(numbers.tolist())})")
    with np.errstate(over="ignore", invalid="ignore"):
        x, y, z = (np.float32(v) for v in (a, b, c))
        expected = np.array([x, y, z, x + y, (x + y) + z, x + (y + z)])
    nan = np.isnan(expected.T)
    ours, theirs = np.array(found[0]), np.array([words32(column) for column in expected]).T
    assert ((ours == theirs) | nan).all() and not nan.all() and (ours[:, 4] != ours[:, 5]).mean() > 0.02
    p, q, r = (torch.tensor(v, dtype=torch.float64).to(torch.float32).to(torch.bfloat16) for v in (a, b, c))
    held = torch.stack([p, q, r, p + q, (p + q) + r, p + (q + r)], 1)
    theirs = np.array([[f"{w & 0xFFFF:04X}" for w in row] for row in held.view(torch.int16).tolist()])
    assert ((np.array(found[1]) == theirs) | held.isnan().numpy()).all()
    assert any(np.array(found[1])[:, 0] != [w[:4] for w in np.array(found[0])[:, 0]]), "control: cutting off would show"


def sketch(rows: int, values: np.ndarray) -> np.float32:
    """The kernel of part 2 in numpy: with fewer rows, more parts, each summed in order, then added in pairs."""
    split = 1
    while split * 2 * rows <= 16:
        split *= 2
    parts = []
    for part in values.reshape(split, -1):
        total = part[0]
        for x in part[1:]:
            total = np.float32(total + x)
        parts.append(total)
    while len(parts) > 1:
        parts = [np.float32(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def test_the_kernel_of_part_2_adds_as_it_is_drawn(opened):
    script = "[...Array(50).keys()].map((s) => [explain.numbers(s), [...Array(32).keys()].map((r) => {0})])"
    script = script.replace("{0}", "explain.word('fp32', explain.kernel(r + 1, explain.numbers(s)).result)")
    several = 0
    for values, words in opened.run(script):
        values = np.array(values, np.float32)
        assert words == words32(np.array([sketch(rows, values) for rows in range(1, 33)]))
        several += len(set(words)) > 1
    assert several > 25, "most rows of numbers must show that the order matters"


def test_the_gradient_of_part_6_is_that_of_float64(opened):
    for delta, tokens in ((0.0, 100), (1e-7, 4096), (0.003, 256), (0.5, 20)):
        found = opened.run(f"explain.drift({delta}, {tokens})")
        expected = {"ratio": np.exp(delta), "sequence": np.exp(delta * tokens), "k3": np.expm1(delta) - delta}
        assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("width", [420, 1280])
def test_each_part_moves_and_nothing_is_wider_than_the_window(opened, width):
    opened.resize(width)
    opened.settle()
    seen = opened.run(
        """(() => {
        const out = {}, set = (id, value, i = 0) => { const of = document.querySelectorAll(id + " input, " + id + " select")[i];
          of.value = value; of.dispatchEvent(new Event("input")); };
        const text = (id) => document.getElementById(id).innerText;
        out.three = text("e1-out"); set("#e1-in", "1e8"); set("#e1-in", "-1e8", 1); set("#e1-in", "1", 2);
        out.moved = text("e1-out");
        set("#e1-in", "x"); out.wrong = text("e1-out");
        out.alone = text("e2-out"); set("#e2-in", 16); out.rows = text("e2-out");
        set("#e3-in", 0); out.mine = text("e3-out"); set("#e3-in", 9); out.crowd = text("e3-out");
        set("#e4-in", 0); out.narrow = text("e4-out"); set("#e4-in", 60); out.wide = text("e4-out");
        out.about = text("e5-about"); out.stock = text("e5-out"); set("#e5-in", "ours"); out.ours = text("e5-out");
        set("#e5-in", "stock"); const of = JSON.parse(document.getElementById("explain-data").textContent).demo.arms.stock.of;
        const rare = of.indexOf(Math.max(...of)), chip = () => document.querySelectorAll("#e5-out rect")[rare];
        chip().dispatchEvent(new Event("click"));
        out.rare = document.querySelector("#e5-out .chosen .count").innerText, out.here = chip().getAttribute("class");
        set("#e5-in", of.indexOf(0) + 1, 2); out.common = document.querySelector("#e5-out .chosen .count").innerText;
        set("#e6-in", 0); out.exact = text("e6-out"); set("#e6-in", 110); out.drift = text("e6-out");
        out.guide = text("e7-out"); document.querySelector("#e7-in input").click(); out.other = text("e7-out");
        out.boxes = [...document.querySelectorAll("#e7-in input")].map((box) => box.getBoundingClientRect().left);
        out.overflow = document.documentElement.scrollWidth - innerWidth;
        return out; })()"""
    )
    assert "fp32: they differ, by 1 of the last place." in seen["three"] and "bf16: " in seen["three"]
    assert "0x3F800000" in seen["moved"] and "must be a number" in seen["wrong"]
    assert "16 workers share your row" in seen["alone"] and "one worker for your row" in seen["rows"]
    assert re.search(r"Of 16 tokens, 0 differ .* 0 on ours", seen["mine"])
    assert re.search(r"Of 16 tokens, ([1-9]|1\d) differ .* 0 on ours", seen["crowd"])
    assert not seen["narrow"].startswith("0 of") and "0 of the" in seen["wide"]
    assert seen["ours"].startswith("1 different text") and seen["stock"] != seen["ours"]
    assert re.search(r"1,000 completions of \".+\" .* as rlinvariant demo draws them: .*, vLLM .*commit", seen["about"])
    assert seen["here"] == "here" and seen["rare"].startswith("1 ×") and not seen["common"].startswith("1 ×")
    assert "the same order, the same bits" in seen["exact"] and "another policy" in seen["drift"]
    assert len(seen["boxes"]) > 3 and len(set(seen["boxes"])) == 1, "each before its words, however long they are"
    assert seen["guide"] != seen["other"] and seen["overflow"] <= 0 and not opened.log


def test_the_page_in_docs_is_what_the_package_makes():
    file = Path(__file__).parents[2] / "docs" / "explain" / "index.html"
    assert file.read_text() == html_explain.page(), f"write html_explain.page() into {file}"


def test_what_was_recorded_is_whole_and_says_where():
    recorded = json.loads((Path(html_explain.__file__).parent / "explain" / "recorded.json").read_text())
    crowd, demo = recorded["crowd"], recorded["demo"]
    assert len(set(map(tuple, crowd["ours"]["words"]))) == 1 and len(set(map(tuple, crowd["stock"]["words"]))) > 1
    assert all(struct.unpack(">f", bytes.fromhex(word))[0] <= 0 for words in crowd["stock"]["words"] for word in words)
    ours, stock = demo["arms"]["ours"], demo["arms"]["stock"]
    assert len(ours["of"]) == len(stock["of"]) == demo["completions"] == ours["logprobs_as_alone"] and set(ours["of"]) == {0}
    assert len(set(stock["of"])) > 1 and stock["unique_logprobs"] > 1 == ours["unique_logprobs"]
    for part in (crowd, demo):  # a real model's words, and where a reader finds what made them
        assert re.fullmatch(r".+, vLLM [\d.]+, commit [0-9a-f]{7}", part["machine"]) and "random" not in part["model"]


def test_a_report_has_it_folded_and_opens_it_from_the_menu(chromium, ablation):
    chromium.open(ablation / "report.html")
    assert chromium.run("document.querySelector('#e1-out').childElementCount") == 0, "nothing is drawn before it is opened"
    x, y = chromium.run(
        "(() => { const b = document.querySelector('nav a:last-child').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    chromium.click(x + 5, y + 5)
    chromium.settle()
    assert "they differ" in chromium.run("document.getElementById('e1-out').innerText")
    top = chromium.run("document.getElementById('why').getBoundingClientRect().top")
    assert -50 < top < 400 and not chromium.log
