"""Tables and sentences say what the rows do, on the page and in the terminal."""

import re
import shutil

from rlinvariant.report import tables
from rlinvariant.report.console import Console
from rlinvariant.report.study import load
from tests.report.pages import text_of
from tests.report.runs import write_ablation, write_run


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


def test_the_terminal_obeys_nothing_that_an_arm_is_called(tmp_path, capsys):
    path = write_ablation(tmp_path / "ablation-h", arms={"exact": ["invariance=exact"], "[red]\x1b[2J": ["invariance=off"]})
    tables.show(load(path), Console())
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"[red]\x1b[2J" in out


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
