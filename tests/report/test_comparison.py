"""Runs beside each other: seeds are found, what differs is named, what is missing is said."""

import json
import os

import pytest

from rlinvariant.cli import main
from rlinvariant.errors import UserError
from rlinvariant.report import comparison, html, tables
from rlinvariant.report.rundir import RunDir
from tests.report.pages import text_of
from tests.report.runs import write_ablation, write_run


def test_runs_that_differ_in_the_seed_alone_are_one_arm_and_settings_that_differ_are_named(tmp_path):
    paths = [
        write_run(tmp_path / f"{name}-s{seed}", seed, [f"trainer.learning_rate={rate}"], reward=gain * seed).path
        for name, rate, gain in (("low", 1e-6, 0.01), ("high", 1e-5, 0.5))
        for seed in (0, 1)
    ]
    study = comparison.load(comparison.located(paths))
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in study.arms] == [("low", [0, 1]), ("high", [0, 1])]
    assert [arm.description for arm in study.arms] == ["trainer.learning_rate=1e-06", "trainer.learning_rate=1e-05"]
    assert study.reference is study.arms[0] and "Reward against low" in dict(tables.sentences(study))
    again = comparison.load(comparison.located([*paths, write_run(tmp_path / "copy", 0, ["trainer.learning_rate=1e-05"]).path]))
    assert [len(arm.runs) for arm in again.arms] == [2, 2, 1], "control: a seed that is there twice has an arm of its own"


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["words0", "words1"], "words"),
        (["words-10", "words-11"], "words"),
        (["words-s0", "words-s1"], "words"),
        (["lr1e-5_seed_0", "lr1e-5_seed_1"], "lr1e-5"),
        (["3", "4"], "3 and 1 more"),
    ],
)
def test_an_arm_of_several_seeds_is_called_what_their_names_share(tmp_path, names, stem):
    paths = [write_run(tmp_path / name, seed, steps=1).path for seed, name in enumerate(names)]
    assert [arm.name for arm in comparison.load(paths).arms] == [stem]


def test_runs_without_a_common_seed_are_not_compared(tmp_path):
    paths = [write_run(tmp_path / name, seed, [f"trainer.lr={seed}"], steps=1).path for seed, name in enumerate("ab")]
    said = dict(tables.sentences(comparison.load(paths)))
    assert said["Reward against a"] == "no verdict: no common seed in b"


def test_runs_of_different_lengths_are_said_to_be(tmp_path):
    paths = [write_run(tmp_path / name, 0, [f"trainer.lr={name}"], steps=steps).path for name, steps in (("a", 12), ("b", 20))]
    said = "Runs end at different steps, 12 to 20: what is held out was trained for different lengths."
    assert said in comparison.load(paths).notes
    assert not any("different steps" in note for note in comparison.load(paths[:1]).notes), "control"


def test_a_page_of_two_runs_says_what_one_of_them_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def without(of: dict) -> dict:
        return {key: value for key, value in of.items() if key != "entropy"}

    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "b", 0, change=without, recipe="reverse")
    assert main(["report", "a", "b", "--out", "both.html"]) == 0
    text = text_of((tmp_path / "both.html").read_text())
    assert "No number of b in: Entropy of the policy." in text and "No number of a" not in text
    assert "Of 2 recipes: arithmetic, reverse. Their rewards are not of one task." in text
    assert main(["report", "a", "b"]) == 0 and (tmp_path / "runs" / "comparison-a-b.html").is_file()
    assert not (tmp_path / "a" / "report.html").exists(), "a run's own page is not touched"


def test_an_ablation_and_a_run_have_a_page(tmp_path):
    ablation = write_ablation(tmp_path / "ablation-a", seeds=[0, 1])
    run = write_run(tmp_path / "other", 0)
    study = comparison.load(comparison.located([ablation, run.path]))
    assert [arm.name for arm in study.arms][:2] == ["ablation-a/exact", "ablation-a/drift"] and len(study.arms) == 3
    assert "rlinvariant report" in text_of(html.page(study))


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a", "a"], "a: given twice, as a; name each run once"),
        (["a", "./a/"], "a: given twice, as a; name each run once"),
        (["a", "none"], "none: no such directory, here or in"),
        (["a", "foreign"], "foreign: holds no ablation.json and no config.json"),
        (["a", "torn"], "torn/config.json: "),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, paths, said):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 0)
    (tmp_path / "foreign").mkdir()
    write_run(tmp_path / "torn", 0).config.write_text('{"recipe": ')
    with pytest.raises(UserError) as error:
        comparison.load(comparison.located(paths))
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_ls_lists_runs_newest_first_and_says_what_is_damaged(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs = tmp_path / "runs"
    write_run(runs / "first", 0)
    write_run(runs / "killed", 0, steps=7, finished=False, drift=0.01)
    write_ablation(runs / "ablation-a", seeds=[0], steps=3)
    torn = write_run(runs / "torn", 0)
    torn.config.write_text("[]")
    write_run(runs / ".cache" / "hidden", 0)
    started = write_run(runs / "started", 0, steps=0, finished=False)
    started.metrics.unlink(missing_ok=True)
    os.utime(started.environment, (10**9 - 1, 10**9 - 1))
    foreign = runs / "first" / "checkpoints" / "checkpoint-1"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text("{}")
    for i, name in enumerate(("first", "killed", "ablation-a/exact/seed-0", "ablation-a/drift/seed-0", "torn")):
        os.utime(runs / name / "metrics.jsonl", (10**9 + i, 10**9 + i))
    assert main(["ls", str(runs)]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines()[1:] if line and not line.startswith(" ")]
    assert names == ["torn", "ablation-a/drift/seed-0", "ablation-a/exact/seed-0", "killed", "first", "started"]
    assert next(x for x in out.splitlines() if x.startswith("started")).split()[1:4] == ["arithmetic", "0", "/"]
    first, killed = ([x for x in out.splitlines() if x.startswith(name)][0] for name in ("first", "killed"))
    assert "20 / 20" in first and "0 / 1,280" in first and "finished" in first
    assert "7 / 20" in killed and "no end yet" in killed and " 0 / " not in killed
    assert "config.json" in out and "2001-09-09" in out


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_ls_of_nothing_is_one_line(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert main(["ls", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_of_a_foreign_run_are_no_code(tmp_path):
    """A name with markup stays text on the page."""
    paths = []
    for name in ("<b>x", "y"):
        path = write_run(tmp_path / f"run{len(paths)}", 0).path
        config = json.loads(RunDir(path).config.read_text())
        config["run"]["value"] = name
        config["trainer.lr"] = {"value": name, "source": "command line"}
        RunDir(path).config.write_text(json.dumps(config))
        paths.append(path)
    page = html.page(comparison.load(paths))
    assert "<b>x" not in page.replace("<b>&lt;b&gt;x", "") and "&lt;b&gt;x" in page
