"""Data sets made of whole and hostile rows: each is taken, or refused by lines that name a row or a column."""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datasets import Dataset

from rlinvariant.recipes.arithmetic import build_tokenizer
from rlinvariant.trainer.preflight import prompts as reading
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import dataset_problems, row_problems
from rlinvariant.trainer.preflight.signatures import needed_columns, signature_problems
from tests.recipes.hub_rows import chat_tokenizer

USER = {"role": "user", "content": "hi"}
TEXTS = [
    "",
    " ",
    "\n\t",
    "\0",
    "1\0",
    "a" * 300,
    "日本",
    "🙈1",
    "<eos>",
    "<pad>1",
    "<unk>",
    "<bos>1",
    "\x1b[31m",
    "\u202e1",
    "%s{}",
]
TEXTS += [
    "\x1b[31m",
    "\u202e1",
    "%s{}",
    "1" * 50_000,
    "{{ x }}",
    "{% raise %}",
    "\ufeff1",
    "\u200b",
    "<|im_end|>",
    "</s>",
    "None",
    "nan",
]
CONTENTS = [None, *TEXTS]
ROLES = [None, "", " ", "user", "assistant", "tool", "usr", "system", "\0", "日本"]
OTHERS = [
    5,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    True,
    b"1",
    b"\xff",
    {"role": "user"},
    {},
    [1, 2],
    [[USER]],
    ["a"],
    [None],
    None,
]
COLUMNS = [
    "answer",
    "completions",
    "prompts",
    "completion",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "image",
    "tools",
    "x",
    "",
]


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def data_sets(count: int, seed: int) -> Iterator[tuple[Dataset, bool, int | None]]:
    """Draw data sets: whether they are messages, and the number of the one row that was spoilt, if it surely is wrong."""
    draw = random.Random(seed)
    while count:
        chat, size = draw.random() < 0.5, draw.choice((1, 2, 3, 20))
        good: Any = [USER] if chat else "1+1="
        prompts: list[Any] = [good] * size
        spoilt, kind = draw.randrange(size), draw.random()
        if kind < 0.3:
            prompts = [draw.choice(OTHERS)] * size
        elif chat:
            prompts[spoilt] = [
                {"role": draw.choice(ROLES), "content": draw.choice(CONTENTS)} for _ in range(draw.choice((0, 1, 2)))
            ]
        else:
            prompts[spoilt] = draw.choice(CONTENTS)
        columns: dict[str, Any] = {
            "prompt": prompts,
            "answer": [draw.choice(("2", None)) if draw.random() < 0.1 else "2"] * size,
        }
        if draw.random() < 0.3:
            columns[draw.choice(COLUMNS)] = [draw.choice(("x", None, 1))] * size
        if draw.random() < 0.05:
            del columns[draw.choice(list(columns))]
        try:
            dataset = Dataset.from_dict(columns)
        except Exception:  # no data set can hold it: that is what its maker hears
            continue
        count -= 1
        sure = kind >= 0.3 and prompts[spoilt] in (None, "", " ", "\n\t", "\0", [])
        yield dataset, chat, spoilt if sure else None


@functools.cache
def tokenizer(chat: bool) -> Any:
    return chat_tokenizer() if chat else build_tokenizer()


def fault(dataset: Dataset, chat: bool, spoilt: int | None) -> str | None:
    """Say what is wrong with the answer to a data set; None: it is taken, or refused as it should be."""
    prompts = Prompts(tokenizer(chat), longest=256, completion=32)
    try:
        lines = dataset_problems(dataset, "train")
        if not lines:
            lines = signature_problems(exact, dataset.column_names, "train")
            needed = [column for column in needed_columns(exact) if column in dataset.column_names]
            found, notes = row_problems(dataset, "train", prompts, needed)
            lines = lines + found
            if spoilt is not None and not any(f"row {spoilt}:" in line for line in found):
                return f"row {spoilt} is not named: {found}"
            for line in notes:
                if "\n" in line or "row " not in line:
                    return f"a note that names no row: {line!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    for line in lines:
        if "\n" in line or "\x1b" in line or len(line) > 1000:
            return f"not one line: {line!r:.300}"
        if not any(word in line for word in ("row ", "column `", "expected ", "`answer`", "rows, and one")):
            return f"names neither row nor column: {line!r}"
    return None


def faults(count: int, seed: int = 0) -> Iterator[str]:
    for dataset, chat, spoilt in data_sets(count, seed):
        if said := fault(dataset, chat, spoilt):
            yield f"{dataset[:2]!r:.200}: {said:.300}"


def test_hostile_data_sets_are_taken_or_refused() -> None:
    assert not (found := list(faults(60))), "\n".join(found)


PLANTS: dict[str, tuple[Any, str, Any, str]] = {
    "a prompt's kind is not looked at": (Prompts, "read", lambda self, prompt: ("text", prompt), ""),
    "blank text passes": (reading, "_require_text", lambda *_: None, "is not named"),
    "messages are not looked at": (reading, "_require_message", lambda *_: None, "Error"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_check_that_is_missing_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one check taken out, the same data sets are not all answered as they should be."""
    place, function, without, words = PLANTS[name]
    monkeypatch.setattr(place, function, without)
    assert any(words in line for line in faults(300))


@pytest.mark.reliability
def test_five_hundred_hostile_data_sets(record_reliability: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(faults(500, seed=1))
    place, function, without, _ = PLANTS["messages are not looked at"]
    monkeypatch.setattr(place, function, without)
    spoilt = 500 - len(list(faults(500, seed=1)))
    record_reliability("data sets", 500 - len(found), 500, f"messages not looked at: {spoilt} / 500")
    assert not found, "\n".join(found)
    assert spoilt < 500, "the control is blind"
