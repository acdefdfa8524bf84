"""The recipes with tools: what is asked, worked out and won; with SmolLM2, exact steps (slow)."""

from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors
from rlinvariant.recipes import calculator, guess
from rlinvariant.recipes.calculator import calculator as work_out
from rlinvariant.report.rundir import read_metrics
from rlinvariant.trainer.preflight.tools import Tooling, tooling_problems
from tests.config.common import with_defaults
from tests.recipes.smollm2 import SHORT, needs_the_model, rlinvariant


def config(*argv: str, recipe: str = "calculator") -> Config:
    return parse(with_defaults(argv, f"recipe={recipe}", "model=org/name", "data.train_size=300"), {})


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("7 + 61", "68"),
        ("12*5", "60"),
        ("3 * (4 - 9)", "-15"),
        ("1 / 3", "0.333333"),
        ("0.1 + 0.2", "0.3"),
        ("6/3", "2"),
        ("-7", "-7"),
    ],
)
def test_the_calculator_works_out(expression: str, result: str) -> None:
    assert work_out(expression) == result


@pytest.mark.parametrize(
    "expression", ["", "2 ** 9", "9" * 81, "1 / 0", "a + 1", "1 +", "__import__('os')", "1, 2", "1_0", "(" * 40]
)
def test_the_calculator_refuses_in_one_line(expression: str) -> None:
    with pytest.raises(ValueError) as raised:
        work_out(expression)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 60


def test_the_answer_is_that_of_the_question() -> None:
    train, evaluation = calculator.datasets(config(), None)
    right = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for row in [*train, *evaluation]:
        asked: Any = row
        text = asked["prompt"][-1]["content"]
        numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]
        a, b = numbers[::-1] if text.startswith("Subtract") else numbers
        assert asked["answer"] in {str(f(a, b)) for f in right.values()} and min(a, b) >= 12


def test_a_setting_out_of_its_range_is_one_line() -> None:
    for argument in ("data.smallest=1", "data.largest=12"):
        with pytest.raises(ConfigErrors) as raised:
            config(argument)
        assert raised.value.errors[0].startswith(f"{argument}: expected ")
    with pytest.raises(ConfigErrors, match=r"data\.guesses=0: expected 1 to 20"):
        config("data.guesses=0", recipe="guess")


@pytest.mark.parametrize("recipe", ["calculator", "guess"])
def test_its_tools_can_be_told_to_a_model(recipe: str) -> None:
    from rlinvariant.tools.plain import plain_tools
    from tests.recipes.hub_rows import chat_tokenizer

    of_recipe = config(recipe=recipe)
    tooling = Tooling(of_recipe.tool_funcs(), of_recipe.environment_factory())
    rows = of_recipe.load_recipe().datasets(of_recipe, None)[0]
    assert tooling_problems(tooling, plain_tools(chat_tokenizer()), rows, of_recipe.reward_funcs()) == []


def test_a_game() -> None:
    game = guess.Game(9, 3)
    game.reset(seed=4)
    number = game._number
    assert game.get_reward() == 0 and 1 <= number <= 9
    other = 1 if number > 1 else 2
    assert game.guess(other) == ("higher" if number > other else "lower") and game.get_reward() == 0.1
    assert game.guess(number) == "right" and game.get_reward() == 1
    with pytest.raises(ValueError, match="over"):
        game.guess(number)
    game.reset(seed=4)
    assert game._number == number, "a seed is a game"
    numbers = set()
    for seed in range(100):
        game.reset(seed=seed)
        numbers.add(game._number)
    assert numbers == set(range(1, 10))


@pytest.mark.parametrize("seed", range(9))
def test_halving_finds_seven_numbers_in_three(seed: int) -> None:
    game = guess.Game(7, 3)
    game.reset(seed=seed)
    low, high = 1, 7
    while game.get_reward() < 1:
        said = game.guess(middle := (low + high) // 2)
        low, high = (middle + 1, high) if said == "higher" else (low, middle - 1)


@pytest.mark.slow
@needs_the_model
@pytest.mark.parametrize("recipe", ["calculator", "guess"])
def test_smollm2_calls_tools_and_is_trained_exactly(recipe: str, tmp_path: Path) -> None:
    rlinvariant(tmp_path, "train", f"recipe={recipe}", "run=exact", *SHORT)
    rows = [row for row in read_metrics(tmp_path / "runs/exact") if "onpolicy/mismatched_tokens" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["onpolicy/mismatched_tokens"] == row["onpolicy/unscored_tokens"] == 0 < row["onpolicy/compared_tokens"]
        assert row["tools/call_frequency"] > 0.3
