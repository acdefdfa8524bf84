"""countdown and reverse: their problems, their graders, and that nothing held out is trained on."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.recipes import _tiny, arithmetic, countdown, reverse
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import row_problems
from tests.config.common import with_defaults

RECIPES = {"arithmetic": arithmetic, "countdown": countdown, "reverse": reverse}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(recipe: str, *argv: str) -> Config:
    return parse(with_defaults(argv, f"recipe={recipe}", "data.train_size=500", "data.eval_size=50"), {})


def graded(recipe: str, row: dict[str, Any], *completions: str) -> list[float]:
    reward = {"countdown": countdown.reaches_target, "reverse": reverse.exact_match}[recipe]
    columns = {key: [value] * len(completions) for key, value in row.items() if key != "prompt"}
    return reward(completions=list(completions), **columns)


@pytest.mark.parametrize(
    ("recipe", "argv"),
    [
        ("countdown", ()),
        ("countdown", ("data.numbers=3", "data.largest=20", "data.operators=+-*")),
        ("countdown", ("data.numbers=2", "data.largest=99")),  # not every pair reaches a target below 100
        ("reverse", ()),
    ],
)
def test_what_is_taught_is_right_and_fits(recipe: str, argv: tuple[str, ...]) -> None:
    limits, generator = config(recipe, *argv), random.Random(1)
    task = RECIPES[recipe].task(limits)
    for _ in range(200):
        problem = task.draw(generator)
        row, taught = task.row(problem), task.solution(problem)
        wrong = [taught[:-1], taught + " ", taught + taught[-1], "", ";", taught.replace(taught[-1], "?")]
        assert graded(recipe, row, taught, *wrong) == [1, *[0] * len(wrong)], (row, taught)
        assert len(taught) + 1 <= (limits.trainer.max_completion_length or 0)
        assert len(row["prompt"]) + len(taught) + 2 <= (limits.sampler.max_model_len or 0)


@pytest.mark.parametrize(("recipe", "argument"), [("countdown", "data.numbers=4"), ("reverse", "data.longest=3")])
def test_held_out_problems_are_not_trained_on(recipe: str, argument: str) -> None:
    parsed, generator = config(recipe, argument), random.Random(2)
    train, evaluation = RECIPES[recipe].datasets(parsed, None)
    for name, rows in (("train", train), ("eval", evaluation)):
        assert row_problems(rows, name, Prompts(_tiny.build_tokenizer())) == ([], [])
    held_out = set(evaluation["prompt"])
    assert (len(train), len(evaluation), len(held_out)) == (500, 50, 50)
    task = RECIPES[recipe].task(parsed)
    kinds = task.held_out(parsed)
    later = [task._training_problem(generator, kinds) for _ in range(2000)]  # what the supervised stage goes on drawing
    trained_on = set(train["prompt"]) | {task.row(problem)["prompt"] for problem in later}
    assert not trained_on & held_out
    assert {task.row(task.draw(generator))["prompt"] for _ in range(2000)} & held_out  # control: unguarded, it would be
    if recipe == "reverse":
        assert not trained_on & {f"{prompt[:-1][::-1]}>" for prompt in held_out}


@pytest.mark.parametrize("recipe", ["countdown", "reverse"])
def test_datasets_are_deterministic_and_seeded(recipe: str) -> None:
    prompts = [list(RECIPES[recipe].datasets(config(recipe, *argv), None)[0]["prompt"]) for argv in ((), (), ("data.seed=1",))]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_out_rows_of_a_file_are_dropped(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation: Any = RECIPES[recipe].datasets(config(recipe), None)[1]
    leaks: list[dict[str, Any]] = list(evaluation)
    if recipe == "countdown":
        leaks += [row | {"nums": row["nums"][::-1]} for row in leaks]
        kept = [{"nums": [9, 7, 4, 2], "target": 99}]
    elif recipe == "reverse":
        leaks += [row | {"prompt": row["answer"] + ">"} for row in leaks]
        kept = [{"prompt": "abcdefghijk>", "answer": "kjihgfedcba"}]
    else:
        leaks += [row | {"prompt": " + ".join(row["prompt"][:-1].split("+")[::-1])} for row in leaks]
        kept = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "What is 1 and 1?", "answer": "2"}]
    Path("mine.jsonl").write_text("\n".join(json.dumps(row) for row in [*leaks[:50], *kept, *leaks[50:]]))
    parsed = config(recipe, "data.path=mine.jsonl")
    train: Any
    train, evaluation_of_file = RECIPES[recipe].datasets(parsed, None)
    assert [{key: row[key] for key in kept[0]} for row in train] == kept
    assert list(evaluation_of_file) == list(evaluation)
    said = f"data.path=mine.jsonl: 100 of {100 + len(kept)} rows dropped, their problems are held out"
    assert capsys.readouterr().out.splitlines() == [said]
    Path("mine.jsonl").write_text("\n".join(json.dumps(row) for row in leaks))
    with pytest.raises(UserError, match=r"^data\.path=mine\.jsonl: 100 of 100 rows dropped, .*; none is left to train on; "):
        RECIPES[recipe].datasets(parsed, None)


def test_a_warm_start_is_kept_for_all_that_its_problems_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[dict[str, Any]] = []
    monkeypatch.setattr(_tiny, "warm_start", lambda *_, key, seed, **__: keys.append(dict(key, seed=seed)) or "")
    changes = ["numbers=3", "numbers=4", "largest=10", "operators=+-*", "eval_size=40", "seed=1"]
    for change in [*changes, "train_size=501"]:
        countdown.prepare_model(config("countdown", *with_defaults([f"data.{change}"], "data.numbers=3")))
    assert [keys.index(key) for key in keys] == [*range(len(changes)), 0]
    assert [key["operators"] for key in keys] == ["+-", "+-", "+-", "+-*", "+-", "+-", "+-"]


@pytest.mark.parametrize("argv", [("numbers=2", "largest=99", "operators=*"), ("numbers=3", "largest=9", "operators=+-")])
def test_countdown_knows_about_how_many_problems_there_are(argv: tuple[str, ...]) -> None:
    parsed = config("countdown", "data.eval_size=1", *(f"data.{argument}" for argument in argv))
    data, counted = parsed.data, 0
    for nums in itertools.combinations_with_replacement(range(data.largest, 0, -1), data.numbers):
        counted += len(countdown.solutions(nums, data.operators))
    assert 0.7 < countdown.task(parsed).problems() / counted < 1.4


FEW = "a tenth of the problems with data.numbers=4"
ROW = {"nums": [9, 7, 4, 2], "target": 8}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("9-7=2,2+4=6,6+2=8;9-7+4+2", 1),
        ("9-7+4+2", 1),
        ("4-(7-9)+2", 1),  # not what is taught
        ("no matter;((9)-7)+(4+2)", 1),
        ("4*2/(9/9);9-7+4+2", 1),  # the last expression alone counts
        ("9-7+4+2;", 0),
        ("9-7+4", 0),  # a number left out
        ("4*2", 0),
        ("8", 0),
        ("9-7+4+2+2-2", 0),  # one used again
        ("94/2-47+8", 0),  # digits joined
        ("9+7-4-2", 0),  # another value
        ("9-7+4+2=8", 0),
        ("9-7+4+2\n", 0),
        ("9 - 7 + 4 + 2", 0),
        ("-7+9+4+2", 0),
        ("9//7*4*2", 0),  # floor
        ("9**7-4-2", 0),
        ("4/(7-7)+9+2", 0),
        ("9-7+4+True*2", 0),
        ("9(7)42", 0),
        ("__import__('os').getpid()", 0),
        ("9**9**9**9**9", 0),
        ("9-7+4+" + "(" * 10_000 + "2" + ")" * 10_000, 0),
        ("(" * 45 + "9-7+4+2" + ")" * 45, 1),
        ("9" * 100, 0),
        ("٩-7+4+2", 0),  # a digit, but not one of ours
    ],
)
def test_countdown_is_graded_by_exact_value_and_each_number_once(completion: str, reward: float) -> None:
    assert graded("countdown", ROW, completion) == [reward]


def test_countdown_divides_exactly() -> None:
    row = {"nums": [1, 3, 3, 5], "target": 5}
    assert graded("countdown", row, "1/3*3*5", "1/3*5*3", "5/(1/3*3)", "5/(1-3/3)") == [1, 1, 1, 0]


def test_countdown_takes_rows_of_the_hub() -> None:
    Path("hub.jsonl").write_text('{"target": 98, "nums": [44, 19, 35]}\n{"target": 64, "nums": [63, 95, 96]}\n')
    train, _ = countdown.datasets(config("countdown", "data.path=hub.jsonl"), None)
    assert row_problems(train, "train", Prompts(_tiny.build_tokenizer())) == ([], [])
    assert list(train["prompt"]) == ["44,19,35=98:", "63,95,96=64:"]
    assert graded("countdown", train[0], "44+19+35", "35+19+44", "44+19") == [1, 1, 0]
    Path("hub.jsonl").write_text('{"target": 98, "nums": [44, 19]}\n{"target": 1, "nums": null}\n')
    with pytest.raises(
        UserError, match=r"^data\.path=hub\.jsonl, row 1: expected whole numbers, `nums` a list and `target` one"
    ):
        countdown.datasets(config("countdown", "data.path=hub.jsonl"), None)


@pytest.mark.parametrize(
    ("recipe", "argument", "message"),
    [
        ("countdown", "data.numbers=5", "data.numbers=5: expected 2 to 4"),
        ("countdown", "data.operators=+/", "data.operators=+/: expected some of + - *, e.g. +-"),
        (
            "countdown",
            "data.largest=2",
            f"data.eval_size=50: expected at most 1, {FEW} data.largest=2 data.operators=+-; lower it or change those",
        ),
        (
            "countdown",
            "data.operators=*",
            f"data.eval_size=50: expected at most 9, {FEW} data.largest=9 data.operators=*; lower it or change those",
        ),
        (
            "countdown",
            "data.largest=99 data.operators=*",
            "data.numbers=4 data.largest=99 data.operators=*: next to no problem to draw; change one of them",
        ),
        ("countdown", "data.operators=", "data.operators=: expected some of + - *, e.g. +-"),
        ("countdown", "data.path=x.jsonl", "data.path=x.jsonl, line 1: expected a JSON object with `nums` and `target`"),
        ("reverse", "data.longest=99", "data.longest=99: expected 2 to 22"),
        ("reverse", "data.path=x.jsonl", "data.path=x.jsonl, line 1: expected a JSON object with `prompt` and `answer`"),
    ],
)
def test_wrong_data_is_refused_before_the_warm_start(recipe: str, argument: str, message: str) -> None:
    Path("x.jsonl").write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    with pytest.raises(ConfigErrors) as raised:
        config(recipe, *argument.split())
    assert raised.value.errors == [message]
