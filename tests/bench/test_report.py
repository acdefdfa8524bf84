"""Results as tables and a figure, and the pages that show them."""

import json
from pathlib import Path

import pytest

from rlinvariant.bench import figure, report
from rlinvariant.bench.measure import Row

ROOT = Path(__file__).parents[2]
OTHERS = [file for file in sorted((ROOT / "docs" / "results").glob("*.md")) if file.stem != "several-gpus"]  # of logs
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *OTHERS]


def row(bench, case, ours, stock, unit, ratio, target, bits):
    return Row(
        bench=bench,
        case=case,
        ours=ours,
        stock=stock,
        unit=unit,
        ratio=ratio,
        target=target,
        bits_equal=bits,
        samples=3,
        others=0.0,
    )


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "h200"
    directory.mkdir()
    environment = {"cpu": {"model": "M", "cores": 2}, "packages": {"torch": "2.11"}, "gpu": {"name": "NVIDIA H200"}}
    bits = {"ours": True, "stock": False}

    def write(name, *rows):
        (directory / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": [vars(r) for r in rows]}))

    write(
        "linear",
        row("linear", "m qkv, 8 x 64 -> 32", 2, 1, "us", 1.2, 1.15, bits),
        row("linear", "m qkv, 64 x 64 -> 32", 1, 1, "us", 1.004, 1.0, bits),
        row("linear", "m o, 64 x 64 -> 16", 1, 1, "us", 1.1, 1.0, bits),
        row("linear", "geometric mean of 1 shapes, 8 rows", 2, 1, "us", 1.0, 1.05, bits),
    )
    write("norms", row("norms", "rms_norm, m, 16 x 64", 1, 2, "us", 0.5, 1.0, bits))
    write(
        "sampler",
        row("sampler", "ours: m, batch 1", 90, 100, "tok/s", 0.9, 0.92, bits),
        row("peer", "VLLM_BATCH_INVARIANT=1: m, batch 1", 30, 100, "tok/s", 0.3, None, bits),
    )
    (directory / "linear_tiles.json").write_text('{"tiles": {}}')
    return directory


def test_the_readme_gets_a_line_for_each_comparison_and_whether_its_target_is_met(results, tmp_path):
    readme = tmp_path / "README.md"
    names = ("linear", "norms", "sampler", "trainer")
    readme.write_text(
        "a\n" + "".join(f"<!-- h200/{name} -->\nstale\n<!-- end -->\n" for name in names) + "<!-- x/y -->\nz\n<!-- end -->"
    )
    report.update(readme, {"h200": report.read(results)})
    text = readme.read_text()
    assert "| 8 rows, each shape | 2 / 1 us | **1.20** | ≤ 1.15 | no | yes | no |" in text
    assert "| 64 rows, each shape | 2 sizes | **1.05** (1.00 to 1.10) | ≤ 1.0 | 1 of 2 | yes | no |" in text
    assert "| rms_norm | 1 / 2 us | **0.50** |" in text and text.count("stale") == 0
    assert "| ours: m, batch 1 | 90 / 100 tok/s | **0.90** | ≥ 0.92 | no | yes | no |" in text
    assert "<!-- h200/trainer -->\nnot measured yet\n<!-- end -->" in text
    assert text.startswith("a\n") and text.endswith("<!-- x/y -->\nz\n<!-- end -->")
    report.update(readme, {"h200": report.read(results)})
    assert readme.read_text() == text


def test_the_figure_has_a_bar_for_each_row_with_a_target_and_each_peer(results, tmp_path):
    page = tmp_path / "cost.md"
    page.write_text("<!-- h200/cost -->\n<!-- end -->")
    report.update(page, {"h200": report.read(results)})
    assert "](cost-h200.svg)" in page.read_text() and "1.11" in (tmp_path / "cost-h200.svg").read_text()
    bars = figure.bars(report.read(results))
    assert [(bar.label, bar.is_ours) for bar in bars] == [("m, batch 1", True), ("VLLM_BATCH_INVARIANT=1: m, batch 1", False)]
    widths = [patch.get_width() for patch in figure.draw(bars, tmp_path / "x.svg").axes[0].patches]
    assert widths == pytest.approx([1 / 0.9, 1 / 0.3])
    below = row("sampler", "ours: m; x", 90, 100, "tok/s", 0.8, 0.92, {})
    assert figure.bars({"sampler": {"rows": [vars(below)]}}) == [("m", 1.25, True)]


def test_nothing_is_drawn_of_what_was_not_measured(results, tmp_path):
    (results / "sampler.json").unlink()
    page = tmp_path / "cost.md"
    page.write_text("<!-- h200/cost -->\n<!-- end -->")
    report.update(page, {"h200": report.read(results)})
    assert "not measured yet" in page.read_text() and not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_say_what_the_results_say(page, tmp_path):
    """Filling a page whose tables were emptied gives the page as it is."""
    found = {path.name: report.read(path) for path in report.RESULTS.iterdir() if path.is_dir()}
    copy, text = tmp_path / page.name, page.read_text()
    emptied = report.MARKED.sub(lambda match: match[0].partition("\n")[0] + "\n<!-- end -->", text)
    copy.write_text(emptied)
    report.update(copy, found)
    assert copy.read_text() == text != emptied


def test_an_interval_wider_than_its_mean_gives_way_to_the_seeds(tmp_path):
    def measures(reward, half, values):
        known = {"mean": reward, "low": reward - half, "high": reward + half, "seeds": 3, "values": values}
        return {title: known for title in ("KL k3, nats", "Reward, last 10 steps", "Held-out accuracy, %")}

    tokens = {"mismatched": 1, "compared": 10}
    difference = {"mean": -0.2, "low": -0.9, "high": 0.5, "seeds": 3}
    verdict = {"Reward, last 10 steps": difference | {"verdict": "no difference seen"}}
    arms = {
        "exact": {"tokens": tokens, "measures": measures(0.8, 0.04, [0.8, 0.8, 0.8])},
        "near": {"tokens": tokens, "measures": measures(0.7, 0.6, [0.5, 0.7, 0.9]), "minus exact, by seed": verdict},
        "far": {"tokens": tokens, "measures": measures(0.4, 0.7, [0.02, 0.6, 0.58]), "minus exact, by seed": verdict},
    }
    (tmp_path / "ablation.json").write_text(json.dumps({"arms": arms, "seeds": [0, 1, 2], "steps": 5, "command": "c"}))
    found = report.markdown(tmp_path)
    assert "| `near` | 1 / 10 | 0.7 ± 0.6 | 0.7 ± 0.6 | 0.7 ± 0.6 | no difference seen |" in found
    assert "| `far` | 1 / 10 | 0.6, 0.58, 0.02 | 0.6, 0.58, 0.02 | 0.6, 0.58, 0.02 | no verdict: the seeds disagree |" in found
