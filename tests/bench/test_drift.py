"""The evidence on drift: what is kept of an ablation's runs, the table and the figure that are made of it."""

import json
import shutil

import numpy as np
import pytest

from rlinvariant.bench import drift, figure, report
from rlinvariant.bench.__main__ import main
from rlinvariant.errors import UserError
from rlinvariant.report import study
from tests.report.runs import row, write_ablation, write_run

FILES = ("config.json", "environment.json", "metrics.jsonl", "result.json")


def test_what_is_kept_gives_the_numbers_of_the_runs_report(tmp_path):
    """Four small files of each run are enough; no digit that is dropped makes 0 or 1 of what is neither."""
    path = write_ablation(tmp_path / "ablation-a")
    for directory in path.glob("*/seed-*"):
        for file in directory.iterdir():
            if file.name not in FILES:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert main(["drift", str(path), "--out", str(tmp_path / "h200")]) == 0
    content = json.loads((tmp_path / "h200" / "drift.json").read_text())
    kept, whole = drift.study_of(content), study.load(path)
    for measure in drift.COMPARED[:-1]:
        for mine, other in zip(kept.arms, whole.arms, strict=True):
            found, expected = mine.estimate(measure), other.estimate(measure)
            assert (found.mean, found.low) == pytest.approx((expected.mean, expected.low), rel=1e-5, nan_ok=True)
    text = drift.table(content)
    counted = sum(row(step, seed, 0.01)["onpolicy/mismatched_tokens"] for step in range(1, 21) for seed in range(3))
    assert f"| `drift` | 3 × 20 | {counted:,} / 3,840 (coverage 1) |" in text and "| `exact` | 3 × 20 | 0 / 3,840" in text
    assert "`drift − exact` | (+" in text and "(higher)" in text and "before training, held-out accuracy, %: 50.0" in text
    assert drift._short(1 - 1e-12) == 1 - 1e-12 and drift._short(1e-300) == 1e-300 and drift._short(0.123456789) == 0.1234568


def test_the_page_gets_a_figure_of_every_arm_and_its_interval(tmp_path):
    content = drift.collect(write_ablation(tmp_path / "ablation-a"))
    axes = figure.draw_curves(content, tmp_path / "x.svg").axes
    assert [[line.get_label() for line in one.get_lines()] for one in axes[:2]] == [["exact", "drift"], ["drift"]]
    assert "exact: 0 at every step" in axes[1].get_xlabel() and len(axes[0].collections) == 2
    values = [np.mean([row(step, seed, 0.0)["reward"] for seed in range(3)]) for step in range(1, 21)]
    assert axes[0].get_lines()[0].get_ydata() == pytest.approx(values, rel=1e-5)
    page = tmp_path / "drift.md"
    page.write_text("<!-- h200/drift -->\n<!-- end -->\n<!-- cpu/drift -->\n<!-- end -->\n")
    report.update(page, {"h200": {"drift": content}, "cpu": {}})
    assert "(drift-h200.svg)\n\n| Arm |" in page.read_text() and (tmp_path / "drift-h200.svg").stat().st_size > 10_000
    assert page.read_text().endswith("<!-- cpu/drift -->\nnot measured yet\n<!-- end -->\n")


def test_a_run_that_failed_after_its_grading_is_evidence_and_the_page_says_so(tmp_path):
    path = write_ablation(tmp_path / "ablation-a")
    file = path / "drift/seed-1/result.json"
    failed = json.loads(file.read_text()) | {"finished": False, "outcome": "failed", "error": "No space left on device"}
    file.write_text(json.dumps(failed))
    assert "grading, 1 run failed (No space left on device)" in drift.table(drift.collect(path))
    note = "drift/seed-1 has all its steps, was graded after them, and failed then (failed: No space left on device)."
    assert note in study.notes(study.load(path))
    file.write_text(json.dumps(failed | {"heldout_reward_after": None}))
    with pytest.raises(UserError, match="drift/seed-1 has not ended"):
        drift.collect(path)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda path: (path / "drift/seed-1/result.json").unlink(), r"drift/seed-1 has not ended"),
        (lambda path: shutil.rmtree(path / "drift/seed-1"), r"Not started yet, and in no number here: drift/seed-1\. "),
        (lambda path: write_run(path / "drift/seed-2", 2, ["trainer.lr=1"]), "runs of arm drift have different settings"),
        (lambda path: (path / "ablation.json").unlink(), "no ablation.json"),
    ],
)
def test_half_of_an_ablation_is_no_evidence(tmp_path, fault, says, capsys):
    path = write_ablation(tmp_path / "ablation-a", steps=3)
    if "different" in says:
        shutil.rmtree(path / "drift/seed-2")
    fault(path)
    with pytest.raises(UserError, match=says):
        drift.collect(path)
    with pytest.raises(SystemExit):
        main(["drift", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and "error: " in capsys.readouterr().err
