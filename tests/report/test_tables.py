"""Tables and sentences say what the rows do, on the page and in the terminal."""

import functools
import json
import operator
import re
import shutil

import pytest

from rlinvariant.ablate import results
from rlinvariant.errors import UserError
from rlinvariant.report import html, tables
from rlinvariant.report.console import Console
from rlinvariant.report.panels import FLIPS
from rlinvariant.report.study import load
from tests.report.pages import text_of
from tests.report.runs import ARMS, write_ablation, write_run


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


def test_experts_that_differ_are_counted_by_layer_beside_exact_zeros(tmp_path, capsys):
    """Layers are in the order of their numbers; a run without experts has a dash, and an ablation without any no table."""
    path = write_ablation(tmp_path / "ablation-m", seeds=(0, 1), arms=ARMS | {"dense": ["invariance=off"]})
    assert tables.routers(load(path)) is None and "other experts" not in html.page(load(path)).lower()
    for arm, flips in (("exact", (0, 0, 0)), ("drift", (3, 2, 1))):
        keys = (FLIPS, f"{FLIPS}/2", f"{FLIPS}/10")
        for seed in (0, 1):
            shutil.rmtree(path / arm / f"seed-{seed}")
            change = functools.partial(operator.or_, dict(zip(keys, flips, strict=True)))
            write_run(path / arm / f"seed-{seed}", seed, ARMS[arm], drift=0.01 * (arm == "drift"), change=change)
    study = load(path)
    table = tables.routers(study)
    assert table is not None and [row[0].text for row in table.rows] == ["any layer", "layer 2", "layer 10"]
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["0 / 2,560", f"{40 * count} / 2,560", "–"] for count in (3, 2, 1)
    ]
    assert table.rows[0][2].said == "4.69e−02" and table.rows[0][1].said == ""
    results.report(path, Console())
    for shown in (capsys.readouterr().out, text_of((path / "report.html").read_text())):
        assert "120 / 2,560" in shown and "layer 10" in shown
    arms = json.loads((path / "summary.json").read_text())["arms"]
    assert (
        arms["drift"]["other experts"]["layer 2"] == {"mismatched": 80, "compared": 2560}
        and "other experts" not in arms["dense"]
    )
    assert "Tokens sent to other experts" in (path / "report.html").read_text(), "the curve"


def test_a_count_of_experts_that_is_none_is_refused(tmp_path):
    for at, value in enumerate((1.5, "many")):
        write_run(tmp_path / str(at), 0, change=functools.partial(operator.or_, {f"{FLIPS}/0": value}))
        with pytest.raises(UserError, match=f"step 1: {FLIPS}/0 is"):
            load(tmp_path / str(at))


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
