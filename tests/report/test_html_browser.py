"""The page in a real browser: charts as the numbers say, no script but its own, light and dark."""

import json
import re

import numpy as np
import pytest

from tests.report.browser import DARK, document, screenshot
from tests.report.pages import KL
from tests.report.runs import row

# What a reader's eye would find wrong, and what hovering shows; written into the document, which --dump-dom prints
PROBE = """
const seen = {overflow: document.documentElement.scrollWidth - innerWidth, outside: [], overlaps: [], script: document.title};
const figures = [...document.querySelectorAll("figure")];
const chart = figures.find((figure) => figure.querySelector("b").textContent === TITLE).querySelector("svg");
for (const svg of document.querySelectorAll("svg.chart")) {
  const frame = svg.viewBox.baseVal, boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBBox()]);
  for (const [text, b] of boxes)
    if (b.x < 0 || b.y < 0 || b.x + b.width > frame.width || b.y + b.height > frame.height) seen.outside.push(text);
  boxes.forEach(([text, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const wide = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
    if (wide > 1 && Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y) > 3) seen.overlaps.push(text + " / " + other);
  }));
}
const box = (element) => { const b = element.getBBox(); return [b.y, b.y + b.height]; };
seen.zero = box(chart.querySelector(".zero"));
seen.lines = Object.fromEntries([...chart.querySelectorAll("[data-label]")].map((p) => [p.dataset.label, box(p)]));
const at = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + at.width / 2, clientY: at.top + 20}));
seen.tip = chart.closest("figure").querySelector(".tip").innerText;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(seen);
document.body.append(out);
"""


@pytest.mark.parametrize("width", [900, 1400])
def test_charts_are_drawn_as_the_numbers_say(ablation, tmp_path, width):
    """An exact arm lies in the band that is labelled 0, drift above it; no label is cut or covered; hovering tells numbers."""
    page = (ablation / "report.html").read_text()
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it would forbid the probe
    file = tmp_path / "probed.html"
    file.write_text(probed.replace("</body>", f"<script>const TITLE = {json.dumps(KL)};{PROBE}</script></body>"))
    dom, _ = document(file, width)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    assert found is not None
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["overflow"] <= 0 and seen["outside"] == [] and seen["overlaps"] == []
    top, bottom = seen["zero"]
    assert top < seen["lines"]["exact"][0] == seen["lines"]["exact"][1] < bottom
    assert seen["lines"]["drift"][1] < top
    step = int(re.search(r"step (\d+)", seen["tip"])[1])  # pyright: ignore[reportOptionalSubscript]
    values = [row(step, seed, 0.01)["onpolicy/kl_k3"] for seed in range(3)]
    assert re.search(r"exact\s+0\s+\[0, 0\]", seen["tip"]), seen["tip"]
    assert f"{sum(values) / 3:.4g}".replace("e-0", "e-") in seen["tip"]
    assert (
        seen["script"] == "arithmetic: 2 arms, 3 seeds, 20 steps"
    )  # what the sample wanted to change, with no policy to stop it


def test_the_policy_lets_the_pages_own_script_run_and_no_other(ablation, tmp_path):
    _, log = document(ablation / "report.html")
    assert "Content Security Policy" not in log
    planted = tmp_path / "planted.html"
    planted.write_text(
        (ablation / "report.html").read_text().replace("</body>", "<script>document.title = 'pwned'</script></body>")
    )
    dom, log = document(planted)
    assert "Content Security Policy" in log and "<title>pwned" not in dom


def test_it_looks_the_same_without_scripts_and_is_dark_where_that_is_preferred(ablation, tmp_path):
    page = ablation / "report.html"
    without = tmp_path / "without.html"
    without.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    assert "<script>" in page.read_text() and "addEventListener" not in without.read_text()
    light, plain, dark = (
        screenshot(file, tmp_path / f"{i}.png", *flags, width=900)
        for i, (file, flags) in enumerate([(page, ()), (without, ()), (page, DARK)])
    )
    assert (light == plain).all()
    assert (light[5, 5] == 255).all() and (dark[5, 5] < 40).all()
    for picture in (light, dark):  # of both, some ink and much paper
        ink = (np.abs(picture.astype(int) - picture[5, 5]).max(2) > 100).mean()
        assert 0.01 < ink < 0.3
