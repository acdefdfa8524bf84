"""gsm8k, math, dapo_math on rows of the hub's schema: what is asked, what is right, what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.recipes import _math, dapo_math, gsm8k, math
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import row_problems
from tests.config.common import with_defaults
from tests.recipes.hub_rows import ROWS, chat_tokenizer, original_dapo_math, write

RECIPES = {"gsm8k": gsm8k, "math": math, "dapo_math": dapo_math}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


def config(recipe: str, *argv: str) -> Config:
    return parse(with_defaults(argv, f"recipe={recipe}", "model=org/name", "data.eval_size=4"), {})


def prepared(recipe: str, tokenizer: Any, rows: list[dict[str, Any]], *argv: str, ending: str = "jsonl") -> Any:
    path = write(rows, f"rows.{ending}")
    return RECIPES[recipe].datasets(
        config(recipe, f"data.path={path}", *with_defaults(argv, "sampler.max_model_len=None")), tokenizer
    )


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("recipe", "question", "answer"),
    [
        ("gsm8k", "Ann has 700 pens and buys 2 boxes of 700. How many pens has she?", "2,100"),
        ("math", r"What is half of $\frac{1}{700}$?", r"\frac{1}{1400}"),
        ("dapo_math", "How many divisors has $2^{700}$?", "701"),
    ],
)
def test_rows_become_chat_prompts_with_answers(recipe, question, answer, ending, tokenizer) -> None:
    train, evaluation = prepared(recipe, tokenizer, ROWS[recipe](700), ending=ending)
    assert row_problems(train, "train", Prompts(tokenizer)) == ([], [])
    assert row_problems(evaluation, "eval", Prompts(tokenizer)) == ([], [])
    assert (len(train), len(evaluation)) == (696, 4)
    rows = {row["prompt"][1]["content"]: row for row in [*train, *evaluation]}
    assert len(rows) == 700  # nothing held out is trained on
    row = rows[question]
    assert row["prompt"] == [{"role": "system", "content": _math.SYSTEM}, {"role": "user", "content": question}]
    assert row["answer"] == answer
    assert r"\boxed{}" in _math.SYSTEM
    (reward,) = RECIPES[recipe].reward_funcs(config(recipe))
    texts = [rf"so \boxed{{{row['answer']}}}", r"so \boxed{0}", row["answer"]]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=messages, answer=[row["answer"]] * 3) == [1, 0, 0]


def test_math_takes_the_answer_out_of_the_solution(tokenizer) -> None:
    rows = [
        {"problem": row["problem"], "level": "Level 1", "type": "Algebra", "solution": row["solution"]}
        for row in ROWS["math"](9)
    ]
    train, _ = prepared("math", tokenizer, rows)
    assert {row["answer"] for row in train} < {rf"\frac{{1}}{{{2 * n}}}" for n in range(1, 10)}


def test_dapo_math_takes_rows_of_the_original(tokenizer) -> None:
    ours, original = (
        [set(map(str, part)) for part in prepared("dapo_math", tokenizer, rows)]
        for rows in (ROWS["dapo_math"](20), original_dapo_math(20))
    )
    assert ours == original and [len(part) for part in ours] == [16, 4]  # the frame is off, and each is there once


def test_what_is_held_out_is_seeded(tokenizer) -> None:
    held_out = [prepared("math", tokenizer, ROWS["math"](50), *argv)[1]["answer"] for argv in ((), (), ("data.seed=1",))]
    assert list(held_out[0]) == list(held_out[1]) != list(held_out[2])


def changed(recipe: str, index: int, **columns: Any) -> list[dict[str, Any]]:
    rows = ROWS[recipe](6)
    rows[index] |= columns
    return rows


FROM = "data.path=rows.jsonl"


@pytest.mark.parametrize(
    ("recipe", "rows", "argv", "message"),
    [
        ("gsm8k", ROWS["math"](6), (), f"{FROM}: no `question`; columns found: problem, solution, answer, subject"),
        ("math", [{"problem": "1+1?"}] * 6, (), f"{FROM}: no `answer` or `solution`; columns found: problem; expected"),
        ("gsm8k", changed("gsm8k", 3, answer="It is 7."), (), f"{FROM}, row 3: empty answer; expected rows as in openai/gsm8k"),
        ("gsm8k", changed("gsm8k", 2, question=None), (), f"{FROM}, row 2: empty question"),
        ("math", changed("math", 1, answer=" ", solution="?"), (), f"{FROM}, row 1: empty answer"),
        ("dapo_math", changed("dapo_math", 5, solution="", reward_model=None), (), f"{FROM}, row 5: empty answer"),
        ("math", ROWS["math"](3), (), "data.eval_size=4: expected at most 2, of 3 different problems; lower it"),
    ],
)
def test_wrong_rows_are_refused_in_one_line(recipe, rows, argv, message, tokenizer) -> None:
    with pytest.raises(UserError) as raised:
        prepared(recipe, tokenizer, rows, *argv)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_torn_files_are_refused_in_one_line(tokenizer) -> None:
    for name, content in (("torn.jsonl", b'{"question": "1+1?", "ans'), ("torn.parquet", b"PAR1 and no more")):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^data\.path={name}: cannot be read: .*; mend the file$"):
            gsm8k.datasets(config("gsm8k", f"data.path={name}"), tokenizer)


def test_a_model_that_cannot_chat_is_refused(tokenizer) -> None:
    from rlinvariant.recipes._tiny import build_tokenizer

    with pytest.raises(UserError, match=r"^model=org/name: its tokenizer has no chat template; choose an instruction-tuned"):
        prepared("gsm8k", build_tokenizer(), ROWS["gsm8k"](6))


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_a_hub_one_line_says_what_to_give(recipe, tokenizer) -> None:
    hub = RECIPES[recipe].SOURCE.hub
    with pytest.raises(UserError, match=rf"^{hub}: cannot be had from the hub: .*give data.path=FILE with its rows$"):
        RECIPES[recipe].datasets(config(recipe), tokenizer)


def test_what_is_missing_is_said_at_once(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    Path("rows.csv").write_text("question,answer\n")
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=gsm8k", "data.path=rows.csv", "data.eval_size=0", "data.seed=-1"], {})
    assert raised.value.errors == [
        "model: missing, recipe gsm8k has none of its own; write model=DIRECTORY or model=ORG/NAME",
        "data.eval_size=0: expected 1 to 100000",
        "data.seed=-1: expected 0 to 4294967295",
        "data.path=rows.csv: expected a file, .jsonl or .parquet, with the columns of openai/gsm8k",
        "recipe=gsm8k: needs math-verify to grade; pip install -e '.[math]'",
    ]
