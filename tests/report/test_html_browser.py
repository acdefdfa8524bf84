"""The page in a real browser: charts as the numbers say, no script but its own, light and dark, mouse and keys."""

import json
import re
import shutil

import numpy as np
import pytest

from rlinvariant.report import html, stats
from tests.report.browser import Browser
from tests.report.pages import KL
from tests.report.runs import row, write_ablation, write_run

# What a reader's eye would find wrong in the pictures that are printed
PRINTED = """(() => {
const seen = {outside: [], overlaps: [], live: [...document.querySelectorAll(".live")].filter((e) => e.offsetHeight).length};
for (const svg of document.querySelectorAll("svg.chart")) {
  const frame = svg.viewBox.baseVal, boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBBox()]);
  for (const [text, b] of boxes)
    if (b.x < 0 || b.y < 0 || b.x + b.width > frame.width || b.y + b.height > frame.height) seen.outside.push(text);
  boxes.forEach(([text, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const wide = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
    if (wide > 1 && Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y) > 3) seen.overlaps.push(text + " / " + other);
  }));
}
const chart = figure(TITLE).querySelector("svg"), box = (of) => { const b = of.getBBox(); return [b.y, b.y + b.height]; };
seen.zero = box(chart.querySelector(".zero"));
seen.lines = Object.fromEntries([...chart.querySelectorAll("[data-label]")].map((p) => [p.dataset.label, box(p)]));
return seen;
})()"""
FIGURE = """
window.named = (title) => (of) => of.querySelector("b").textContent === title;
window.figure = (title) => [...document.querySelectorAll("figure")].find(named(title));
window.place = (of) => { const b = of.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
window.shown = (title) => place(figure(title).querySelector(".u-over"));
window.told = (title) => { const tip = figure(title).querySelector(".tip"); return tip.hidden ? "" : tip.innerText; };
window.change = (label, value) => {
  const of = [...document.querySelectorAll(".charts label")].find((one) => one.innerText.startsWith(label));
  const control = of.querySelector("select, input");
  control.value = value;
  control.dispatchEvent(new Event("input"));
};
"""


@pytest.fixture
def opened(chromium, ablation) -> Browser:
    """The ablation's page, 1,280 wide."""
    chromium.open(ablation / "report.html")
    chromium.run(FIGURE)
    return chromium


def show(page: Browser, title: str) -> list[float]:
    """Scroll to a chart and return where it is drawn: left, top, right, bottom."""
    page.run(f"figure({title!r}).scrollIntoView({{block: 'center'}})")
    page.settle()
    page.settle()
    return page.run(f"shown({title!r})")


def hovered(page: Browser, title: str, share: float = 0.5) -> str:
    """Move the mouse onto a chart and return what it then says."""
    left, top, right, bottom = show(page, title)
    page.mouse("mouseMoved", left + share * (right - left), (top + bottom) / 2)
    page.settle()
    return page.run(f"told({title!r})")


@pytest.mark.parametrize("width", [900, 1400])
def test_printed_charts_are_drawn_as_the_numbers_say(opened, width):
    """An exact arm lies in the band that is labelled 0, drift above it; no label is cut or covered."""
    opened.resize(width)
    opened.call("Emulation.setEmulatedMedia", media="print")
    seen = opened.run(PRINTED.replace("TITLE", repr(KL)))
    opened.call("Emulation.setEmulatedMedia", media="")
    assert seen["live"] == 0 and seen["outside"] == [] and seen["overlaps"] == []
    top, bottom = seen["zero"]
    assert top < seen["lines"]["exact"][0] == seen["lines"]["exact"][1] < bottom
    assert seen["lines"]["drift"][1] < top


@pytest.mark.parametrize("width", [420, 1280, 2000])
def test_hovering_tells_the_numbers_beside_the_cursor(opened, width):
    """The box lies on the chart's own picture, not under it, and nothing of the page is wider than the window."""
    opened.resize(width)
    opened.settle()
    said = hovered(opened, KL)
    step = int(re.search(r"step (\d+)", said)[1])  # pyright: ignore[reportOptionalSubscript]
    values = [row(step, seed, 0.01)["onpolicy/kl_k3"] for seed in range(3)]
    assert 9 <= step <= 11 and re.search(r"exact\s+0\s+\[0, 0\]", said), said
    drift = float(re.search(r"drift\s+(\S+)", said)[1])  # pyright: ignore[reportOptionalSubscript]
    assert drift == pytest.approx(sum(values) / 3, rel=1e-3)
    left, top, right, bottom = opened.run(f"place(figure({KL!r}).querySelector('.tip'))")
    x0, y0, x1, y1 = opened.run(f"place(figure({KL!r}))")
    _, plot_top, _, plot_bottom = opened.run(f"shown({KL!r})")
    assert x0 - 1 <= left < right <= x1 + 1 and y0 < plot_top <= top < bottom and top < plot_bottom
    assert opened.run("document.documentElement.scrollWidth") <= width and not opened.log
    assert opened.run("document.title") == "arithmetic: 2 arms, 3 seeds, 20 steps"  # what the sample wanted to change


def test_dragging_zooms_every_chart_and_a_double_click_resets(opened):
    left, top, right, bottom = show(opened, "Reward")
    opened.drag(left + 0.5 * (right - left), left + 0.8 * (right - left), (top + bottom) / 2)
    first, last = (int(re.search(r"step (\d+)", hovered(opened, KL, at))[1]) for at in (0.01, 0.99))  # pyright: ignore
    assert 10 <= first <= 12 and 15 <= last <= 17
    left, top, right, bottom = show(opened, KL)
    for clicks in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            opened.mouse(kind, (left + right) / 2, (top + bottom) / 2, clicks)
    opened.settle()
    assert [re.search(r"step (\d+)", hovered(opened, KL, at))[1] for at in (0.01, 0.99)] == ["1", "20"]  # pyright: ignore


def test_keys_read_a_chart_aloud_and_zoom_it(opened):
    show(opened, "Reward")
    opened.run("figure('Reward').querySelector('.live').focus()")
    opened.key("Home")
    opened.key("ArrowRight")
    spoken = opened.run("document.querySelector('[aria-live]').textContent")
    assert spoken.startswith("step 2: exact 0.2") and "; drift 0.2" in spoken
    opened.key("+")
    assert re.search(r"step (\d+)", hovered(opened, "Entropy of the policy", 0.99))[1] not in ("19", "20")  # pyright: ignore
    opened.run("figure('Reward').querySelector('.live').focus()")
    opened.key("Escape")
    assert re.search(r"step 20", hovered(opened, "Entropy of the policy", 0.99))
    label = opened.run("figure('Reward').querySelector('.live').getAttribute('aria-label')")
    assert label.startswith("Reward, mean of the step, against the step; last exact 0.")


def test_controls_change_the_axis_the_smoothing_and_the_arms(opened):
    plain = hovered(opened, "Reward")
    assert "tokens" not in plain and "running" not in plain
    opened.run("change('x', 'tokens')")
    said = hovered(opened, "Reward", 0.99)
    assert "step 20, 1 tokens" in said, said  # these rows say that a run has drawn one token
    opened.run("change('x', 'step')")
    opened.run("change('smoothing', '2')")
    values = np.array([[row(step, seed, 0.0)["reward"] for step in range(1, 21)] for seed in range(3)])
    mean, low, high = stats.curve(np.array([stats.running_mean(v, 5) for v in values]), np.ones((3, 20), bool))
    said = hovered(opened, "Reward")
    i = int(re.search(r"step (\d+)", said)[1]) - 1  # pyright: ignore[reportOptionalSubscript]
    running = [float(x) for x in re.search(r"exact\s+\S+\s+running mean (\S+) \[(\S+), (\S+)\]", said).groups()]  # pyright: ignore
    assert running == pytest.approx([mean[i], low[i], high[i]], rel=1e-3)
    opened.run("document.querySelector('.legend input[aria-label=\"show exact\"]').click()")
    assert "exact" not in hovered(opened, "Reward") and "mean" in hovered(opened, "Reward")
    opened.run("[...figure('Reward').querySelectorAll('button')].find((b) => b.textContent === 'log').click()")
    assert opened.run("figure('Reward').querySelector('button').getAttribute('aria-pressed')") == "true"


def test_the_browser_computes_as_python_does(opened):
    """Seeds that are missing, gaps, equal values: means, intervals and running means agree with report/stats.py."""
    random = np.random.default_rng(0)
    values = random.standard_normal((3, 40))
    values[:, 7], values[1, 9] = 0.1, np.nan
    present = random.random((3, 40)) > 0.2
    present[:, 7] = True
    rows = zip(values.tolist(), present.tolist(), strict=True)
    packed = [[None if not there else "-" if v != v else v for v, there in zip(*row, strict=True)] for row in rows]
    script = f"(() => {{ const c = charts.curve({json.dumps(packed)}); return [c.mean, c.low, c.high]; }})()"
    found = np.array(opened.run(script), float)
    expected = np.array(stats.curve(np.where(present, values, np.nan), present))
    assert (np.isnan(found) == np.isnan(expected)).all() and np.isnan(expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0, 7] == found[1, 7] == 0.1
    running = opened.run(f"charts.runningMean({json.dumps(packed[1])}, 5)")
    for x, y, there in zip(running, stats.running_mean(np.where(present, values, np.nan)[1], 5), present[1], strict=True):
        assert (x is None) if not there else (x == "-") if y != y else x == pytest.approx(y, rel=1e-12)


def test_ticks_say_what_they_are_and_differ(opened):
    """The step may be one that four digits do not show: an axis had "1" twice."""
    steps = [(middle, m * 10.0**p) for middle in (0, 1) for p in range(-9 + middle, 10) for m in (1, 2, 2.5, 5)]
    rows = [[round(middle + i * step, 12) for i in range(-3, 4)] for middle, step in steps]
    for values, said in zip(rows, opened.run(f"{json.dumps(rows)}.map(charts.ticks)"), strict=True):
        assert len(set(said)) == len(values) and "-" not in "".join(said), said
        assert [float(text.replace("−", "-")) for text in said] == pytest.approx(values, abs=1e-12), said


def test_an_exact_run_is_one_line_whose_panels_open_and_drift_stands_open(chromium, tmp_path):
    seen = {}
    for name, drift in (("exact", 0.0), ("off", 0.01)):
        path = write_run(tmp_path / name, 0, drift=drift).path
        chromium.open(html.write(path)[0])
        chromium.run(FIGURE)
        seen[name] = chromium.run(
            "[document.querySelector('#exactness .strip').innerText, "
            "figure('Largest |Δ logprob| in a step').checkVisibility(), "
            "place(figure('Reward'))[1] < place(document.querySelector('#exactness'))[1]]"
        )
        if name == "exact":
            chromium.run("document.querySelector('details.folded summary').click()")
            assert re.fullmatch(r"step \d+, .*\n0", hovered(chromium, KL).replace("\t", ""))
    assert seen["exact"] == ["exact: 0 / 1,280 tokens", False, True]
    assert seen["off"][0].startswith("not exact: 1,2") and seen["off"][1] is True


def test_every_chart_is_drawn_without_scrolling_and_the_controls_stay_in_sight(opened):
    """Whoever saves the whole page, or scrolls fast, sees no gap; smoothing and x are there for the last chart, too."""
    undrawn = "[...document.querySelectorAll('.live')].filter((of) => of.clientWidth && !of.querySelector('canvas')).length"
    wait = "new Promise((done) => { const look = () => UNDRAWN ? setTimeout(look, 20) : done(true); look(); })"
    opened.run(wait.replace("UNDRAWN", undrawn))
    opened.run("change('smoothing', '1')")
    assert opened.run(undrawn) > 5, "control: what is far away is drawn later"
    opened.run(wait.replace("UNDRAWN", undrawn))
    show(opened, "Trainer")
    _, top, _, bottom = opened.run("place(document.querySelector('.bar.charts'))")
    assert 0 <= top < bottom < 150 and opened.run("scrollY") > 2000


def test_a_picture_that_is_downloaded_has_its_paper_its_title_and_the_names_of_the_lines(opened):
    script = """(async () => {
      let made; URL.createObjectURL = (blob) => (made = blob, ""); HTMLAnchorElement.prototype.click = () => {};
      [...figure("Reward").querySelectorAll("button")].find((b) => b.textContent === "png").click();
      while (!made) await new Promise((done) => setTimeout(done, 20));
      const bitmap = await createImageBitmap(made), to = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
      to.drawImage(bitmap, 0, 0);
      const {data} = to.getImageData(0, 0, bitmap.width, 50), clear = data.filter((x, i) => i % 4 === 3 && x < 255).length;
      const inked = (from, to) => data.slice(4 * from * bitmap.width, 4 * to * bitmap.width).filter((x) => x < 128).length;
      return [clear, inked(0, 5), inked(5, 25), inked(30, 46)]; })()"""
    show(opened, "Reward")
    clear, margin, title, names = opened.run(script)
    assert clear == margin == 0 and title > 100 and names > 100


def test_wide_intervals_of_two_seeds_leave_the_curves_readable(chromium, tmp_path):
    """Two seeds have an interval of 12.7 standard errors: it may not squeeze the means into a line."""
    path = write_ablation(tmp_path / "ablation-two", seeds=(0, 1))
    for seed in (0, 1):
        for old in (path / "exact" / f"seed-{seed}").iterdir():
            old.unlink() if old.is_file() else shutil.rmtree(old)
        write_run(
            path / "exact" / f"seed-{seed}",
            seed,
            ["invariance=exact"],
            change=lambda r, s=seed: r | {"reward": r["reward"] + s},
        )
    chromium.open(html.write(path)[0])
    chromium.run(FIGURE)
    left, top, right, bottom = (round(x) for x in show(chromium, "Reward"))
    seen = chromium.picture()[top:bottom, left:right].astype(int)
    rows = np.nonzero((seen.max(2) < 60).any(1))[0]  # the exact arm's line is nearly black
    assert np.ptp(rows) > 0.12 * (bottom - top)


def test_the_policy_lets_the_pages_own_script_run_and_no_other(ablation, chromium, tmp_path):
    chromium.open(ablation / "report.html")
    assert not chromium.log
    planted = tmp_path / "planted.html"
    planted.write_text(
        (ablation / "report.html").read_text().replace("</body>", "<script>document.title = 'pwned'</script></body>")
    )
    chromium.open(planted)
    assert any("Content Security Policy" in line for line in chromium.log) and chromium.run("document.title") != "pwned"


def test_without_scripts_the_drawings_stay_and_it_is_dark_where_that_is_preferred(ablation, chromium, tmp_path):
    page = ablation / "report.html"
    without = tmp_path / "without.html"
    without.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    assert "<script>" in page.read_text() and "addEventListener" not in without.read_text()
    for dark, paper in ((False, 255), (True, 23)):
        chromium.open(without, width=900, dark=dark)
        drawn = chromium.run("[...document.querySelectorAll('svg.chart')].filter((one) => one.clientHeight > 90).length")
        picture = chromium.picture()
        ink = (np.abs(picture.astype(int) - picture[5, 5]).max(2) > 100).mean()
        assert picture[5, 5, 0] == paper and drawn > 20 and 0.01 < ink < 0.3  # some ink and much paper


def test_a_run_of_one_step_has_no_empty_chart(chromium, tmp_path):
    chromium.open(html.write(write_run(tmp_path / "one", 0, steps=1).path)[0])
    chromium.run(FIGURE)
    title = "Time of a step by part"
    show(chromium, title)
    middle = f"""(() => {{ const of = figure({title!r}).querySelector("canvas"), at = of.getContext("2d");
      return [...at.getImageData(of.width / 2 + 20, of.height / 2, 1, 1).data]; }})()"""
    assert chromium.run(middle)[3] > 100, "the area is painted beside its step, too"
    assert hovered(chromium, title, 0.4).startswith("step 1")
    chromium.run("change('x', 'tokens')")
    assert chromium.run(middle)[3] > 100 and not chromium.log
