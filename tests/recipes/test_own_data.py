"""Training without a recipe: which rows and rewards are taken, and what is refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, enable_progress_bars

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.resumption import settings

ROWS = [{"prompt": f"{n}+1=", "answer": f"{n + 1:03}"} for n in range(20)]
REWARD = "def right(completions, answer, **_):\n    return [float(c == a) for c, a in zip(completions, answer)]\nnone = 3\n"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(REWARD)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def config(*argv: str) -> Config:
    defaults = {"model": "org/name", "data.path": "rows.jsonl", "reward": "mine.py:right"}
    given = {argument.partition("=")[0] for argument in argv}
    return parse([*(f"{key}={value}" for key, value in defaults.items() if key not in given), *argv], {})


def rows(*argv: str) -> Any:
    made = config(*argv)
    return made.load_recipe().datasets(made, None)


def test_every_kind_of_file_gives_the_same_rows() -> None:
    made = Dataset.from_list(ROWS)
    made.to_parquet("rows.parquet")
    made.to_csv("rows.csv")
    Path("rows.json").write_text(json.dumps(ROWS))
    made.save_to_disk("saved")
    DatasetDict({"train": made, "test": made.select([0])}).save_to_disk("splits")
    for path in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "saved", "splits"):
        train, held_out = rows(f"data.path={path}")
        assert train.to_list() == ROWS and held_out is None, path
    train, held_out = rows("data.path=splits", "data.eval_split=test")
    assert held_out.to_list() == ROWS[:1] and train.to_list() == ROWS[1:]


def test_no_bar_stands_in_our_lines(capfd: pytest.CaptureFixture[str]) -> None:
    enable_progress_bars()
    rows()
    assert capfd.readouterr().err == ""


def test_rows_are_held_out_by_prompt() -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    train, held_out = rows("data.eval_size=5")
    assert len(held_out) == 5 and not set(train["prompt"]) & set(held_out["prompt"])
    assert len(train) == 40 - 2 * len(set(held_out["prompt"]))
    assert rows("data.eval_size=5")[1].to_list() == held_out.to_list() != rows("data.eval_size=5", "data.seed=1")[1].to_list()


def test_rewards_are_functions_of_files_and_modules_and_their_files_are_compared_on_resume() -> None:
    made = config("reward=mine.py:right,mine:right", "trainer.reward_weights=1,0.5", "run=one")
    first, second = made.reward_funcs()
    assert first(["3"], ["3"]) == second(["3"], ["3"]) == [1.0]
    digests = [value for key, value in settings(made).items() if key.startswith("file of reward")]
    assert len(digests) == 2 and len(set(digests)) == 1
    Path("other.py").write_text(REWARD + "# edited\n")
    assert settings(config("reward=other.py:right", "run=two"))["file of reward other.py:right, sha256"] not in digests


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("reward=mine.py", "reward=mine.py: expected FILE.py:FUNCTION or MODULE:FUNCTION, such as my_rewards.py:right"),
        ("reward=no.py:right", "reward=no.py:right: no such file; expected FILE.py:NAME, the path of a Python file"),
        ("reward=mine.py:rigth", "reward=mine.py:rigth: mine.py has no `rigth`; did you mean right?"),
        ("reward=mine.py:none", "reward=mine.py:none: expected a function, found int 3"),
        ("reward=no_module:f", "reward=no_module:f: no module no_module here or installed; give FILE.py:NAME"),
        ("reward=broken.py:f", "reward=broken.py:f: cannot be imported: ZeroDivisionError: division by zero ("),
        ("data.path=no.jsonl", "data.path=no.jsonl: no such file; expected a file (.jsonl, .json, .parquet, .csv), a directo"),
        ("data.path=empty.jsonl", "data.path=empty.jsonl: an empty file; give one with rows"),
        ("data.path=mine.py", "data.path=mine.py: expected a name that ends in .jsonl, .json, .parquet, .csv"),
        ("data.split=test", "data.split=test: data.path=rows.jsonl is one file, without splits; remove it"),
        ("data.eval_size=-1", "data.eval_size=-1: expected 0 or more"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(argument: str, line: str) -> None:
    Path("broken.py").write_text("f = 1 / 0\n")
    Path("empty.jsonl").touch()
    with pytest.raises(ConfigErrors) as raised:
        config(argument)
    (found,) = raised.value.errors
    assert found.startswith(line)


def test_half_of_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigErrors) as raised:
        parse(["data.path=rows.jsonl"], {})
    assert [line.split(":")[0] for line in raised.value.errors] == ["model", "reward"]
    with pytest.raises(ConfigErrors) as raised:
        parse(["reward=mine.py:right", "model=org/name"], {})
    (line,) = raised.value.errors
    assert line.startswith("data.path: missing; expected a file")


def test_rows_without_a_prompt_and_damaged_ones_are_one_line() -> None:
    Path("rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    with pytest.raises(
        UserError, match=r"^data\.path=rows\.jsonl: no column `prompt`; columns found: question, answer; rename"
    ):
        rows()
    Path("rows.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"^data\.path=rows\.jsonl: cannot be read: .*; mend the file$"):
        rows()


def test_a_csv_file_is_read_with_a_byte_order_mark_lines_in_values_and_blank_lines() -> None:
    Path("rows.csv").write_text('\ufeff\nprompt,answer\n"1+1\n=",2\n\n"2, 3",NA\n1+0=,\n', encoding="utf-8")
    kept = [{"prompt": "1+1\n=", "answer": "2"}, {"prompt": "2, 3", "answer": "NA"}, {"prompt": "1+0=", "answer": ""}]
    assert rows("data.path=rows.csv")[0].to_list() == kept


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt,answer\nWhat is 2, 3 and 4 added?,9\n", ":2: 3 values, and the header names 2 columns; mend the row"),
        ("prompt,answer\n1+1=,2,\n2+2=,4,\n", ":2: 3 values, and the header names 2 columns; mend the row"),
        ('prompt,answer\n"1+1\n=",2\n\n2+2=\n', ":5: 1 value, and the header names 2 columns; mend the row"),
        ("prompt,answer,answer\n1+1=,2,3\n", ":1: two columns `answer`; rename one"),
        (",prompt\n0,1+1=\n", ":1: column 1 of 2 has no name; name it, or take it out"),
        ("prompt,answer\n", ": no rows; give a file with some"),
        ("\n\n", ": no rows; give a file with some"),
    ],
)
def test_a_csv_file_whose_columns_would_shift_or_without_rows_is_one_line(text: str, line: str) -> None:
    Path("rows.csv").write_text(text)
    with pytest.raises(UserError) as raised:
        rows("data.path=rows.csv")
    assert str(raised.value).startswith(f"data.path=rows.csv{line}")
