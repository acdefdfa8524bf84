"""Problems in words: what is asked, what is right, what is held out; with SmolLM2, exact steps beside a control (slow)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors
from rlinvariant.model_source import local_model
from rlinvariant.recipes import words
from tests.config.common import with_defaults
from tests.recipes.smollm2 import MODEL, SMALL, needs_the_model, rlinvariant, rows

VALUES = {words.in_words(number): number for number in range(100)}


def config(*argv: str) -> Config:
    return parse(with_defaults(argv, "recipe=words", "model=org/name", "data.train_size=500"), {})


def asked(row: Any) -> str:
    return row["prompt"][-1]["content"]


def operands(question: str) -> tuple[int, int]:
    a, b = [VALUES[word] for word in re.findall("[a-z-]+", question) if word in VALUES]
    return (b, a) if question.startswith("Subtract") else (a, b)


def test_numbers_in_words() -> None:
    assert [words.in_words(n) for n in (0, 12, 20, 21, 99)] == ["zero", "twelve", "twenty", "twenty-one", "ninety-nine"]
    assert len(VALUES) == 100


@pytest.mark.parametrize(("operator", "right"), [("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)])
def test_the_answer_is_that_of_the_question(operator: str, right: Any) -> None:
    train, evaluation = words.datasets(config(f"data.operators={operator}", "data.eval_size=4"), None)
    assert {asked(row).split()[0] for row in train} == {wording.split()[0] for wording in words.WORDINGS[operator]}
    for row in [*train, *evaluation]:
        a, b = operands(asked(row))
        assert row["answer"] == str(right(a, b)) and int(row["answer"]) >= 0
        assert row["prompt"][:-1] == words.EXAMPLE


def test_no_numbers_are_held_out_and_trained_on() -> None:
    def problems(rows: Any) -> set[tuple[int, int, str]]:
        pairs = [(operands(asked(row)), row["answer"]) for row in rows]
        return {(min(pair), max(pair), answer) for pair, answer in pairs}

    train, evaluation = words.datasets(config(), None)
    assert len(evaluation) == config().data.eval_size == len(problems(evaluation))
    assert not problems(train) & problems(evaluation)


def test_the_last_number_of_an_answer_counts() -> None:
    right = ["7", "4 + 3 = 7", "It is 7.", "7 apples, of 7", "12 - 5 = 7", "007"[2:]]
    wrong = ["", "seven", "70", "7.5", "7, or 8", "-7", "7 + 1", "1,007", "7 ** 2"]
    completions = [[{"role": "assistant", "content": text}] for text in right + wrong]
    rewards = words.last_number(completions, ["7"] * len(completions))
    assert rewards == [1.0] * len(right) + [0.0] * len(wrong)
    messages = [[{"role": "assistant", "content": text}] for text in ("It is 1,007.", "2 - 9 = -7", "9-7")]
    assert words.last_number(messages, ["1007", "-7", "7"]) == [1.0, 1.0, 1.0]


def test_rows_of_ones_own_file(tmp_path: Path) -> None:
    _, evaluation = words.datasets(config(), None)
    held_out = next(iter(evaluation))
    for index, wording in enumerate(words.WORDINGS["+"]):
        assert words.read({"prompt": wording.format(a="two", b="ten")}, 12) == ("+", 2, 10, index)
    other = {"prompt": [{"role": "user", "content": "Count to five."}], "answer": "5"}
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (held_out, other)))
    train, _ = words.datasets(config(f"data.path={path}"), None)
    assert [asked(row) for row in train] == ["Count to five."]


@pytest.mark.parametrize("argument", ["data.largest=3", "data.operators=+/", "data.operators=++", "data.operators="])
def test_wrong_settings_are_one_line(argument: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        config(argument)
    (line,) = raised.value.errors
    assert line.startswith(f"{argument}: expected ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which an exact and a stock run have done two steps with the real model."""
    directory = tmp_path_factory.mktemp("words")
    for name in ("exact", "off"):
        rlinvariant(directory, "train", "recipe=words", f"run={name}", f"invariance={name}", *SMALL)
    return directory


@pytest.mark.slow
@needs_the_model
def test_smollm2_is_trained_exactly(finished: Path) -> None:
    exact, off = rows(finished, "exact"), rows(finished, "off")
    assert len(exact) == len(off) == 2
    for row in exact:
        assert row["onpolicy/mismatched_tokens"] == row["onpolicy/unscored_tokens"] == 0 < row["onpolicy/compared_tokens"]
        assert row["onpolicy/coverage"] == 1
    for row in off:  # the control: stock kernels, the same prompts and seeds
        assert row["onpolicy/mismatched_tokens"] > 0.5 * row["onpolicy/compared_tokens"] > 0


@pytest.mark.slow
@needs_the_model
def test_its_own_template_ends_a_completion(finished: Path) -> None:
    """Every completion would run to the limit without the template's end token."""
    assert all(row["completions/clipped_ratio"] < 1 for row in rows(finished, "exact"))


@pytest.mark.slow
@needs_the_model
def test_the_report_shows_the_run(finished: Path) -> None:
    page = finished / "runs/exact/report.html"
    page.unlink()  # the run's own
    rlinvariant(finished, "report", "runs/exact")
    assert "words" in page.read_text()


@pytest.mark.slow
@needs_the_model
def test_verify_short_is_exact(tmp_path: Path) -> None:
    said = rlinvariant(tmp_path, "verify", MODEL, "--short")
    assert MODEL in said and "exact" in said
    assert Path(local_model(MODEL)).is_dir()
