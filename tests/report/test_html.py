"""The page: true to the rows, harmless whatever they hold, readable in a real browser."""

import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlinvariant import cli
from rlinvariant.config import parse
from rlinvariant.errors import UserError
from rlinvariant.report import html, svg, tables
from rlinvariant.report.console import Console
from rlinvariant.report.study import command, load
from tests.report.browser import DARK, document, screenshot
from tests.report.runs import row, write_ablation, write_run

KL = "KL, sampler to trainer (k3)"
HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "</pre></dl><style>body{display:none}</style>\x1b[2J\x1b]0;pwned\x07[bold red]\u202edwp&amp;"
)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    """Two arms, three seeds; the sample of one is hostile."""
    path = write_ablation(tmp_path_factory.mktemp("runs") / "ablation-a")
    sample = {"step": 20, "prompt": HOSTILE, "completion": HOSTILE + "x" * 2**20, "reward": 1.0}
    with (path / "drift" / "seed-0" / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    html.write(path)
    return path


def text_of(page: str) -> str:
    """What a reader sees, without tags."""
    found = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader().feed(re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL))
    return "".join(found)


def figure(page: str, title: str) -> str:
    return next(part for part in page.split("<figure>")[1:] if f"<b>{title}</b>" in part)


def curves(page: str, title: str) -> dict[str, str]:
    """{label: path} of the lines of one panel."""
    return dict(re.findall(r'data-label="([^"]*)" d="([^"]*)"', figure(page, title)))


# ---- in a browser

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


# ---- true to the rows


def test_the_outcome_is_said_first_in_exact_integers(ablation):
    text = text_of((ablation / "report.html").read_text())
    outcome = text[: text.index("Numbers")]
    assert "exact: mismatched 0 / 3,840 tokens, coverage 1" in outcome
    assert re.search(r"drift: mismatched 3,\d\d\d / 3,840 tokens", outcome)
    assert "Reward against exact: no difference seen in drift (differences over the same 3 seeds)" in outcome


def test_the_page_and_the_terminal_have_the_same_numbers(ablation, capsys):
    study = load(ablation)
    tables.show(study, Console())
    shown, page = capsys.readouterr().out, text_of((ablation / "report.html").read_text())
    for table in (tables.summary(study), tables.differences(study)):
        assert table is not None
        for cell in (cell for line in table.rows for cell in line):
            assert cell.text in shown and cell.text in page and cell.said in page


def test_reward_that_differs_is_called_so_and_the_rest_is_not(tmp_path):
    path = write_ablation(tmp_path / "ablation-b")
    for seed in range(3):
        shutil.rmtree(path / "drift" / f"seed-{seed}")
        write_run(path / "drift" / f"seed-{seed}", seed, ["invariance=off"], drift=0.01, reward=-0.3)
    said = dict(tables.sentences(load(path)))
    assert re.match(r"lower in drift \(−0\.(29|30)\d ± 0\.0\d\d\)", said["Reward against exact"])
    assert said["Held-out accuracy against exact"].startswith("no difference seen in drift")


def test_nothing_that_is_not_exact_is_rounded_to_look_exact(tmp_path):
    def almost(of: dict) -> dict:
        return of | {"onpolicy/is_ess": 1 - 1e-9, "onpolicy/kl_k3": 1e-12, "onpolicy/is_ratio/max": 1 + 1e-8}

    write_run(tmp_path / "run", 0, change=almost)
    (cells,) = tables.summary(load(tmp_path / "run")).rows
    texts = [cell.text for cell in cells]
    assert "1 − 1.0e−09" in texts and "1.00e−12" in texts and "1 … 1 + 1.0e−08" in texts


def test_a_value_that_is_no_number_leaves_a_gap_and_a_note(tmp_path):
    def broken(of: dict) -> dict:
        return of | ({"policy/entropy": math.nan, "onpolicy/kl_k3": math.inf} if of["step"] in (5, 6) else {})

    path = write_ablation(tmp_path / "ablation-c")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, ["invariance=off"], drift=0.01, change=broken)
    page = html.write(path)[0].read_text()
    assert {name: d.count("M") for name, d in curves(page, "Entropy of the policy").items()} == {"exact": 1, "drift": 2}
    assert {name: d.count("M") for name, d in curves(page, KL).items()} == {"exact": 1, "drift": 2}
    assert "Entropy of the policy: not a finite number in drift/seed-1 at 2 steps, first 5" in text_of(page)


def test_long_curves_lose_no_spike_and_no_gap(tmp_path):
    def odd(of: dict) -> dict:
        special = {1234: 7.0, 2345: -3.0, 1777: math.nan}
        return of | {"reward/mean": special.get(of["step"], 0.5)}

    random = row(1, 0, 0.0)
    path = write_run(tmp_path / "run", 0, steps=0).path
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 3001):
            values = odd(random | {"step": step})
            file.write(json.dumps({k: "NaN" if v != v else v for k, v in values.items()}) + "\n")
    drawn = figure(html.write(path)[0].read_text(), "Reward")
    numbers = re.search(r'<script type="application/json">(.*?)</script>', drawn)
    assert numbers is not None
    points = {point[0]: point[1:] for line in json.loads(numbers[1]) for point in line["points"]}
    assert points[1234][0] == 7 and points[2345][0] == -3 and points[1777] == [None]
    assert len(points) < 3 * svg.WIDTH
    thin = re.search(r'class="raw[^"]*" d="([^"]*)"', drawn)
    assert thin is not None and thin[1].count("M") == 2


LOG0 = "log and zero"


@pytest.mark.parametrize(("scale", "values", "band"), [(LOG0, [0, 0, 0], 1), (LOG0, [0, 1e-9, 3], 1), ("log", [1, 2, 300], 0)])
def test_axes_take_in_every_mean(scale, values, band):
    steps, mean = np.arange(3), np.array(values, float)
    axis = svg._axis([svg.Line("a", 0, steps, mean, mean, mean, mean)], scale)
    y = axis.place(mean)
    assert axis.has_zero_band == bool(band) and np.isfinite(y).all() and (y >= 0).all() and (y <= svg.HEIGHT - svg.BOTTOM).all()
    assert (np.diff(y)[np.diff(mean) > 0] < 0).all()


def test_labels_are_moved_apart_and_keep_their_order():
    places = svg._apart([50, 50, 51, 199], 10, 200)
    assert all(b - a >= svg.LABEL for a, b in zip(places, places[1:], strict=False)) and places == sorted(places)
    assert places[-1] <= 200 and max(abs(a - b) for a, b in zip(places[:3], (50, 50, 51), strict=True)) < 2 * svg.LABEL + 1


# ---- bad input


def test_interrupted_empty_and_missing_runs_are_named(tmp_path):
    path = write_ablation(tmp_path / "ablation-d", arms={"exact": ["invariance=exact"], "drift": ["invariance=off"]})
    for seed, steps in ((0, 7), (1, 0)):
        shutil.rmtree(path / "drift" / f"seed-{seed}")
        write_run(path / "drift" / f"seed-{seed}", seed, ["invariance=off"], steps, 0.01, finished=False)
    shutil.rmtree(path / "drift" / "seed-2")
    (path / "drift" / "seed-0" / "metrics.jsonl").open("a").write('{"step": 8, "tor')
    file, study = html.write(path)
    text = text_of(file.read_text())
    assert "drift/seed-0 has not ended by itself (interrupted, or still running): its rows end at step 7 of 20" in text
    assert "drift/seed-1 has no step: it ended before the first one." in text
    assert "Not started yet, and in no number here: drift/seed-2." in text
    # the seed that both have is compared over the steps that both have
    assert dict(tables.sentences(study))["Reward against exact"] == "one seed: no interval, no verdict"
    reference = study.reference
    assert reference is not None
    found = study.arms[1].against(reference, tables.REWARD).difference.mean
    expected = [row(s, 0, 0.01)["reward/mean"] - 0.001 - row(s, 0, 0.0)["reward/mean"] for s in range(1, 8)]
    assert found == pytest.approx(sum(expected) / 7 + 0.001, abs=1e-12)


def test_a_run_before_its_first_step_has_a_page(tmp_path):
    write_run(tmp_path / "run", 0, steps=0, finished=False)
    text = text_of(html.write(tmp_path / "run")[0].read_text())
    assert "no token compared" in text and "this run has no step" in text


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    page = html.write(write_ablation(tmp_path / "ablation-e", seeds=[0]))[0].read_text()
    text = text_of(page)
    assert "One seed: no interval, so no verdict." in text and "one seed: no interval" in text
    assert "no difference seen in" not in text and 'class="band' not in page


def test_mixed_recipes_are_refused_in_one_line_that_names_the_runs(tmp_path):
    path = write_ablation(tmp_path / "ablation-f")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, recipe="countdown")
    with pytest.raises(UserError) as raised:
        html.write(path)
    message = str(raised.value)
    assert "an ablation of recipe=arithmetic, but drift/seed-1 has recipe=countdown" in message and "\n" not in message
    assert not (path / "report.html").exists()


def test_other_schemas_are_refused(tmp_path):
    path = write_ablation(tmp_path / "ablation-g")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, schema=2)
    with pytest.raises(UserError, match="expected runs of schema 1, but drift/seed-1 has schema 2"):
        load(path)
    (path / "ablation.json").write_text('{"schema": 7}')
    with pytest.raises(UserError, match="schema 7, expected 1"):
        load(path)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    for change, message in [
        (lambda: None, "holds no ablation.json and no config.json"),
        (lambda: (tmp_path / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda: (tmp_path / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda: (tmp_path / "ablation.json").write_text('{"schema": 1}'), "not the description of an ablation"),
    ]:
        change()
        with pytest.raises(UserError, match=message) as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value)
    run = write_run(tmp_path / "run", 0)
    run.metrics.write_text('{"step": 1}\n{\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of JSON"):
        load(run.path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"a": 1}\n', r'metrics\.jsonl:1: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 1}\n[1]\n', r'metrics\.jsonl:2: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 1.0}\n', r'metrics\.jsonl:1: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 4, "reward/mean": "high"}\n', 'step 4: reward/mean is "high", expected a number or null'),
        (
            "metrics.jsonl",
            '{"step": 4, "onpolicy/mismatched_tokens": 0.5}\n',
            r"tokens is 0\.5, expected a whole number of tokens",
        ),
        ("config.json", '{"seed": 3}', r"config\.json: seed is 3, expected \{"),
        ("config.json", '{"steps": {"value": "many"}}', r'config\.json: steps is "many", expected an integer'),
        ("environment.json", '{"packages": 5}', r"environment\.json: packages is 5, expected a JSON object"),
        ("environment.json", '{"cpu": {"isa": [1]}}', r"environment\.json: cpu\.isa is \[1\], expected a JSON object"),
        ("environment.json", '{"schema": 2}', "schema 2, expected 1; report it with the version that wrote it"),
        ("result.json", '{"accuracy_after": "good"}', r'result\.json: accuracy_after is "good", expected a number or null'),
    ],
)
def test_a_damaged_file_is_one_line_that_says_what_was_expected(tmp_path, capsys, name, content, message):
    run = write_run(tmp_path / "run", 0, steps=1)
    (run.path / name).write_text(content)
    assert cli.main(["report", str(run.path)]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and str(run.path) in printed and printed.count("\n") == 1


def test_what_is_null_or_absent_is_no_damage(tmp_path):
    run = write_run(tmp_path / "run", 0, steps=1, kernels=None, threads=None, cpu={"model": "x", "isa": None}, git=None)
    file, study = html.write(run.path)
    facts = dict(re.findall(r'<th scope="row">(\w+)</th><td class="text">(.*?)</td>', file.read_text()))
    assert facts["CPU"] == "x, None cores, " and facts["Kernels"] == "–" and facts["Threads"] == "" and "Commit" not in facts
    assert curves(file.read_text(), "Reward") and not study.notes[1:]
    run.environment.write_text("{}")
    run.metrics.write_text('{"step": 1, "reward/mean": null, "note": "text"}\n')
    page = html.write(run.path)[0].read_text()
    facts = dict(re.findall(r'<th scope="row">(\w+)</th><td class="text">(.*?)</td>', page))
    assert facts == {"Python": "–", "Platform": "–", "Kernels": "–", "Threads": ""}
    assert "Not drawn, as no run has a number for it: " in page and "<b>Reward</b>" not in page
    assert "mismatched - / - tokens, coverage -" in text_of(page)


def test_runs_that_differ_in_where_they_were_made_and_short_ones_are_noted(tmp_path):
    path = write_ablation(tmp_path / "ablation-n")
    assert not load(path).notes
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, ["invariance=off"], steps=9, packages={}, git={"commit": "x"}, cpu={"model": "x"})
    notes = "\n".join(load(path).notes)
    for what in ("sets of package versions", "git commits", "CPU models"):
        assert f"The runs were made with 2 different {what}" in notes
    assert "Fewer than 10 steps in drift/seed-1: the reward there is the mean over all of them." in notes


def test_a_seed_that_collapsed_is_seen(tmp_path):
    """Every seed has a dot for its reward and one for its accuracy."""
    path = write_ablation(tmp_path / "ablation-s")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, ["invariance=off"], drift=0.01, reward=-2.0)
    page = html.write(path)[0].read_text()
    reward = next(part for part in page.split("<figure>") if '<span class="unit">last 10 steps</span>' in part)
    places = {arm: [float(x) for x in re.findall(rf'class="seed c{arm}" cx="([\d.]+)"', reward)] for arm in (0, 1)}
    assert len(places[0]) == len(places[1]) == 3
    collapsed, *others = sorted(places[1])
    assert others[0] - collapsed > 10 * (others[1] - others[0]) and "%</text>" not in reward
    assert len(re.findall('class="seed c', figure(page, "Held-out accuracy"))) == 6


def test_samples_are_shown_as_text_and_long_ones_cut(ablation):
    page = (ablation / "report.html").read_text()
    assert len(page) < 600_000 and "\x1b" not in page and "\u202e" not in page and page.count("<script>") == 1
    text = text_of(page)
    assert r"<script>document.title='pwned'</script>" in text and r"\x1b[2J\x1b]0;pwned\x07[bold red]\u202edwp&amp;" in text
    assert f"cut: the first 2,000 of {len(HOSTILE) + 2**20:,} characters" in text


def test_the_terminal_obeys_nothing_that_an_arm_is_called(tmp_path, capsys):
    path = write_ablation(tmp_path / "ablation-h", arms={"exact": ["invariance=exact"], "[red]\x1b[2J": ["invariance=off"]})
    tables.show(load(path), Console())
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"[red]\x1b[2J" in out


def test_the_page_asks_for_nothing_from_anywhere(ablation):
    """No element that loads something, no handler, no style that does; the hostile sample has all of them, as text."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.extend([tag, *(name for name, _ in attrs)])

    page = (ablation / "report.html").read_text()
    Reader().feed(page)
    assert not {"img", "link", "iframe", "object", "embed", "base", "form", "a", "use", "src", "href", "srcdoc"} & set(found)
    assert {"svg", "d", "path"} <= set(found) and not [name for name in found if name.startswith("on")]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


# ---- to do it again


def test_the_command_of_a_run_gives_its_configuration_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["recipe=arithmetic", "steps=3", "invariance=off", "trainer.learning_rate=1e-05", "wandb.tags=a b,c", "run=x",
            "trainer.vllm_importance_sampling_correction=true", "sampler.enforce_eager=false"]  # fmt: skip
    config = parse(argv)
    program, train, *again = shlex.split(command(json.loads(json.dumps(config.resolved()))))
    assert (program, train) == ("rlinvariant", "train")
    assert parse(again).resolved() == config.resolved()


def test_the_commands_of_the_command_line(ablation, tmp_path, capsys):
    assert cli.main(["report", str(ablation)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {ablation / 'report.html'}\n")
    for arguments, message in [
        (["report", str(tmp_path / "none")], "holds no ablation.json and no config.json"),
        (["report", "runs/nope"], "error: runs/nope: holds no ablation.json and no config.json"),
        (["report"], "report: the following arguments are required: RUN_OR_ABLATION; see rlinvariant report --help"),
        (["report", "a", "b"], "report: unrecognized arguments: b; see rlinvariant report --help"),
        (["dashboard", "draw"], "dashboard: argument action: invalid choice: 'draw' (choose from "),
        (["dashboard", "push", "a", "b"], "dashboard: unrecognized arguments: b; see rlinvariant dashboard --help"),
    ]:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_a_terminal_that_is_too_narrow_for_the_columns_gets_a_block_for_each_arm(ablation):
    study = load(ablation)
    for table in (tables.summary(study), tables.differences(study)):
        assert table is not None
        for width in (80, 150, None):
            lines = table.lines(width)
            assert all(len(line) <= (width or 1000) for line in lines)
            said = re.sub(r"\s+", " ", " ".join(lines))
            assert all(cell.text in said for row in table.rows for cell in row)
    narrow = tables.summary(study).lines(80)
    assert narrow[0] == "exact" and "  Mismatched / tokens      0 / 3,840  coverage 1" in narrow
    assert table.lines(40)[:1] == ["drift − exact"]
