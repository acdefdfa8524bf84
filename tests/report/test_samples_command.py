"""`rlinvariant samples`: what is asked for, in 80 columns, and nothing that a terminal obeys."""

import json
import os

import pytest
from rich.cells import cell_len

from rlinvariant import cli
from rlinvariant.report import completions, search
from rlinvariant.report.rundir import RunDir
from tests.report.damages import HOSTILE
from tests.report.runs import write_ablation
from tests.report.said import said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = RunDir.create(tmp_path_factory.mktemp("runs") / "run", {"steps": {"value": 3, "source": "default"}})
    for step in (1, 2, 3):
        rows = said(step, groups=3)
        for row in rows:
            row["prompt_id"] = f"{row['group']:012x}"  # each step asks the same prompts
            row["completion"] += f" of step {step}\nsecond line"
        rows[7]["reward"] = step * 10.0
        completions.write(directory.path, rows)
    return directory.path


@pytest.fixture
def asked(run, capsys, monkeypatch):
    """Run the command on a terminal of 80 columns; return (exit code, lines, error)."""
    monkeypatch.setenv("COLUMNS", "80")

    def ask(*options: str, path=run):
        code = cli.main(["samples", str(path), *options])
        said_, error = capsys.readouterr()
        assert not {c for c in said_ + error if not c.isprintable() and c != "\n"}
        return code, said_.splitlines(), error

    return ask


def test_the_newest_step_is_shown_in_80_columns(asked):
    code, lines, _ = asked()
    assert code == 0 and max(map(cell_len, lines)) <= 80
    assert len(lines) == 1 + 12 + 1 and all(line.split()[0] == "3" for line in lines[1:13])
    assert "sample 0 of step 3⏎second line" in lines[1]


def test_best_and_worst_are_by_the_number_asked_for(asked):
    def chosen(*options: str) -> list[tuple]:
        rows = [json.loads(line) for line in asked(*options, "--json")[1]]
        return [(row["step"], row["sample_id"]) for row in rows]

    every = {(step, i): row for step in (1, 2, 3) for i, row in enumerate(said(step, groups=3))}
    assert chosen("--best", "3") == [(3, 7), (2, 7), (1, 7)]
    assert chosen("--step", "1-2", "--best", "1") == [(2, 7)]
    for key in ("length", "advantage", "logprob"):
        value = search.KEYS[key]
        values = [value(every[at]) for at in chosen("--sort", key)]
        assert len(values) == 36 and values == sorted(values, reverse=True) != values[::-1], key
        (lowest,) = chosen("--sort", key, "--worst", "1")
        assert value(every[lowest]) == min(values)


def test_a_completion_without_a_reward_is_neither_best_nor_worst(tmp_path, asked):
    rows = said(1)
    rows[0]["reward"] = None
    rows[1]["reward"] = float("nan")
    completions.write(RunDir.create(tmp_path / "run", {}).path, rows)
    for end in ("--best", "--worst"):
        (line,) = asked(end, "1", "--json", path=tmp_path / "run")[1]
        assert isinstance(json.loads(line)["reward"], float)


def test_texts_and_expressions_are_found_in_prompts_and_completions(asked):
    count = lambda *options: len(asked(*options, "--json")[1])  # noqa: E731
    assert count("--search", "OF STEP 2") == 12
    assert asked("--search", "/OF STEP 2/")[0] == 2, "an expression minds the case"
    assert count("--search", "/^2\\+1=$/") == 4 and count("--search", "/sample [12] .*3\\n/") == 2
    assert count("--search", "//") == 0, "the beginning of a comment is a text"
    late = asked("--search", "second")[1]
    assert "second line" in late[1]


def test_the_completions_of_a_prompt_stand_side_by_side(asked):
    _, lines, _ = asked("--prompt", "000000000001")
    assert lines[0] == "prompt 000000000001, step 3 (asked at steps 1, 2, 3)" and max(map(cell_len, lines)) <= 80
    beside = next(line for line in lines if "sample 4" in line)
    assert "sample 5" in beside and "sample 6" in beside, "control: one below the other with --full"
    assert not any("sample 4" in line and "sample 5" in line for line in asked("--prompt", "000000000001", "--full")[1])


def test_whole_texts_are_shown_with_each_reward(asked):
    _, lines, _ = asked("--step", "2", "--best", "1", "--full")
    assert lines[0].startswith("step 2, sample 7, prompt 000000000001: reward 20.000 (exact 0.750, format -), advantage 0.250")
    assert lines[-3:-1] == ["    sample 7 of step 2", "    second line"]


@pytest.mark.parametrize("options", [(), ("--best", "3"), ("--step", "last")])
def test_a_run_without_completions_is_one_line(options, tmp_path, asked):
    code, lines, error = asked(*options, path=RunDir.create(tmp_path / "run", {}).path)
    assert code == 2 and not lines and "has no completions: no step was taken, or completions_gib=0" in error


@pytest.mark.parametrize("form", [(), ("--full",), ("--json",), ("--prompt", "0")])
def test_no_completion_commands_the_terminal(form, tmp_path, asked):
    """`asked` looks for control characters; the control: the texts are full of them."""
    rows = said(1, completion=HOSTILE, prompt=HOSTILE, extra={HOSTILE: HOSTILE})
    rows = [row | {"rewards": {HOSTILE: 1.0}} for row in rows]
    completions.write(RunDir.create(tmp_path / "run", {}).path, rows)
    code, lines, _ = asked(*form, path=tmp_path / "run")
    assert code == 0 and "script" in "".join(lines) and "\x1b" in rows[0]["completion"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "9"], "no completions of step 9; there are of steps 1 to 3"),
        (["--step", "x"], "--step x: expected a step, a range as 10-20, or last"),
        (["--search", "/(/"], "--search /(/: no regular expression"),
        (["--search", "nothing of the kind"], "none of its completions is as asked for"),
        (["--sort", "colour"], "choose from"),
        (["--search", ""], "--search: empty; write a value, or leave the option out"),
        (["--prompt", ""], "--prompt: empty"),
        (["--step", ""], "--step: empty"),
        (["--best", "0"], "expected a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line(options, message, asked):
    code, lines, error = asked(*options)
    assert code == 2 and not lines and message in error and error.count("\n") == 1


def test_an_ablation_and_no_run_are_named(tmp_path, asked):
    path = write_ablation(tmp_path / "ablation-a", seeds=[0], steps=1)
    assert f"is an ablation; name one of its runs, as {path}/drift/seed-0" in asked(path=path)[2]
    assert "no such run" in asked(path=tmp_path / "nothing")[2]


def test_a_damaged_file_is_said_and_the_others_are_shown(tmp_path, asked):
    path = RunDir.create(tmp_path / "run", {}).path
    for step in (1, 2):
        file = completions.write(path, said(step))
    os.truncate(file, 100)
    code, lines, _ = asked("--best", "99", path=path)
    assert code == 0 and len(lines) == 8 + 2 + 1 and "step-000002.parquet: damaged" in lines[-1]


def test_a_run_of_an_earlier_version_is_searched(tmp_path, asked):
    path = RunDir.create(tmp_path / "run", {}).path
    (path / "samples.jsonl").write_text('{"step": 1, "prompt": "1+1=", "completion": "2", "reward": 1.0}\n')
    code, lines, _ = asked("--best", "1", path=path)
    assert code == 0 and lines[1].split() == ["1", "0", "1.000", "-", "-", "-", "1+1=", "2"]
