"""The page: true to the rows, and harmless whatever they hold."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from rlinvariant.report import html, html_charts, tables
from tests.report.pages import HOSTILE, KL, curves, figure, text_of
from tests.report.runs import row, write_ablation, write_run


def test_the_outcome_is_said_first_in_exact_integers(ablation):
    text = text_of((ablation / "report.html").read_text())
    outcome = text[: text.index("Of all completions of a step")]
    assert "exact: mismatched 0 / 3,840 tokens, coverage 1" in outcome
    assert re.search(r"drift: mismatched 3,\d\d\d / 3,840 tokens", outcome)
    assert "Reward against exact: no difference seen in drift (differences over the same 3 seeds)" in outcome


def test_a_value_that_is_no_number_leaves_a_gap_and_a_note(tmp_path):
    def broken(of: dict) -> dict:
        return of | ({"entropy": math.nan, "onpolicy/kl_k3": math.inf} if of["step"] in (5, 6) else {})

    path = write_ablation(tmp_path / "ablation-c")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, ["invariance=off"], drift=0.01, change=broken)
    page = html.write(path)[0].read_text()
    assert {name: d.count("M") for name, d in curves(page, "Entropy of the policy").items()} == {"exact": 1, "drift": 2}
    assert {name: d.count("M") for name, d in curves(page, KL).items()} == {"exact": 1, "drift": 2}
    assert "Entropy of the policy: not a finite number in drift/seed-1 at 2 steps, first 5" in text_of(page)


def test_long_curves_lose_no_spike_and_no_gap(tmp_path, monkeypatch):
    def odd(of: dict) -> dict:
        special = {1234: 7.0, 2345: -3.0, 1777: math.nan}
        return of | {"reward": special.get(of["step"], 0.5)}

    random = row(1, 0, 0.0)
    path = write_run(tmp_path / "run", 0, steps=0).path
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 3001):
            values = odd(random | {"step": step})
            file.write(json.dumps({k: "NaN" if v != v else v for k, v in values.items()}) + "\n")
    for most, count in ((10**6, 3000), (1, 1000)):
        monkeypatch.setattr(html_charts, "NUMBERS", most)
        drawn = figure(html.write(path)[0].read_text(), "Reward")
        numbers = re.search(r'<script type="application/json">(.*?)</script>', drawn)
        assert numbers is not None
        (line,) = json.loads(numbers[1])["lines"]
        points = dict(zip(line["steps"], line["seeds"][0], strict=True))
        assert points[1234] == 7 and points[2345] == -3 and points[1777] == "-"
        assert 0.6 * count < len(points) <= count
    thin = re.search(r'class="raw[^"]*" d="([^"]*)"', drawn)
    assert thin is not None and thin[1].count("M") == 2


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
    expected = [row(s, 0, 0.01)["reward"] - 0.001 - row(s, 0, 0.0)["reward"] for s in range(1, 8)]
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


def test_what_is_null_or_absent_is_no_damage(tmp_path):
    run = write_run(tmp_path / "run", 0, steps=1, kernels=None, threads=None, cpu={"model": "x", "isa": None}, git=None)
    file, study = html.write(run.path)
    facts = dict(re.findall(r'<th scope="row">(\w+)</th><td class="text">(.*?)</td>', file.read_text()))
    assert facts["CPU"] == "x, None cores, " and facts["Kernels"] == "–" and facts["Threads"] == "" and "Commit" not in facts
    assert curves(file.read_text(), "Reward") and not study.notes[1:]
    run.environment.write_text("{}")
    run.metrics.write_text('{"step": 1, "reward": null, "note": "text"}\n')
    page = html.write(run.path)[0].read_text()
    facts = dict(re.findall(r'<th scope="row">(\w+)</th><td class="text">(.*?)</td>', page))
    assert facts == {"Python": "–", "Platform": "–", "Kernels": "–", "Threads": ""}
    assert "Not drawn, as no run has a number for it: " in page and "<b>Reward</b>" not in page
    assert "mismatched - / - tokens, coverage -" in text_of(page)


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


def test_the_page_asks_for_nothing_from_anywhere(ablation):
    """No element that loads something, no handler, no style that does; the hostile sample has all of them, as text."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.extend([tag, *(name for name, _ in attrs)])

    page = (ablation / "report.html").read_text()
    Reader().feed(page)
    assert not {"img", "link", "iframe", "object", "embed", "base", "form", "use", "src", "srcdoc"} & set(found)
    assert all(place.startswith("#") for place in re.findall(r'href="([^"]*)"', page))
    assert {"svg", "d", "path"} <= set(found) and not [name for name in found if name.startswith("on")]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
