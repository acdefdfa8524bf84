"""Every row that cannot be trained on is told by a line with its number, as TRL would have read it."""

from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rlinvariant.recipes.arithmetic import build_tokenizer
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import dataset_problems, row_problems
from tests.recipes.hub_rows import chat_tokenizer

GOOD, CHAT = {"prompt": "1+1="}, {"prompt": [{"role": "user", "content": "hi"}]}


def looked_at(rows: Any, tokenizer: Any = None, needed: tuple[str, ...] = (), **limits: Any) -> tuple[list[str], list[str]]:
    """Return problems and notes of a data set."""
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    if problems := dataset_problems(dataset, "train"):
        return problems, []
    return row_problems(dataset, "train", Prompts(tokenizer or build_tokenizer(), **limits), needed)


def messages(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"prompt": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        (Dataset.from_dict({"question": ["1+1="], "answer": ["2"]}), ", row 0: no `prompt`; columns found: question, answer"),
        (Dataset.from_dict({"prompt": []}), ": expected at least one row, found none"),
        (Dataset.from_dict({"prompt": ["a"], "image": ["b"]}), ": column `image` is not supported, only text prompts; drop it"),
        (Dataset.from_dict({"prompt": ["a"], "completions": ["b"]}), ": column `completions` is an argument that TRL gives"),
        (
            Dataset.from_dict({"prompt": ["a"], "trainer_state": ["b"]}),
            ": column `trainer_state` is an argument that TRL gives",
        ),
        (Dataset.from_list([GOOD]).with_format("pandas"), ": format pandas: expected rows as dicts"),
        (
            Dataset.from_list([GOOD]).to_iterable_dataset(),
            ": expected a datasets.Dataset, got IterableDataset; load it without",
        ),
        (DatasetDict(train=Dataset.from_list([GOOD])), ": expected a datasets.Dataset, got DatasetDict; choose a split"),
    ],
)
def test_a_data_set_that_is_wrong_as_a_whole_is_one_line(dataset: Any, line: str) -> None:
    (found,) = dataset_problems(dataset, "train")
    assert found.startswith(f"train dataset{line}")


def test_fewer_rows_than_a_rollout_takes_are_refused() -> None:
    rows = Dataset.from_list([GOOD] * 3)
    assert dataset_problems(rows, "train", 3) == []
    (line,) = dataset_problems(rows, "train", 4)
    assert line.startswith("train dataset: 3 rows, and one rollout takes 4 prompts: no step could be made; add rows, or lower")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([GOOD, GOOD, {"prompt": None}], ", row 2: no `prompt`, found None; columns found: prompt"),
        ([{"prompt": []}, CHAT], ", row 0: no `prompt`, found []; columns found: prompt"),
        ([GOOD, {"prompt": "  \n"}, {"prompt": "\t"}], ", row 1: a blank `prompt` '  \\n': expected text (1 more such row)"),
        ([GOOD, {"prompt": "1\0+1="}], ", row 1: `prompt` has a NUL character"),
        ([{"prompt": 5}], ", row 0: `prompt` is int 5: expected text, or a list of messages"),
        (
            [{"prompt": float("nan")}] * 3,
            ", row 0: `prompt` is float nan: expected text, or a list of messages (2 more such rows)",
        ),
        ([{"prompt": True}], ", row 0: `prompt` is bool True"),
        ([{"prompt": b"1+1="}], ", row 0: `prompt` is bytes"),
        ([{"prompt": {"role": "user", "content": "x"}}], ", row 0: `prompt` is dict"),
        ([{"prompt": [1, 2, 3]}], ", row 0: message 0 is int 1: expected role and content"),
        ([{"prompt": ["a", "b"]}], ", row 0: message 0 is str a"),
        ([{"prompt": [[{"role": "user", "content": "x"}]]}], ", row 0: message 0 is list"),
        ([{"prompt": [{"role": "user"}]}], ", row 0: message 0: `content` is None: expected text"),
        ([CHAT, messages(None)], ", row 1: message 0: `content` is None: expected text"),
        ([{"prompt": [{"content": "x"}]}], ", row 0: message 0: `role` is None: expected text"),
        ([CHAT, messages("x", " ")], ", row 1: message 0: a blank `role`"),
        ([CHAT, messages("  ")], ", row 1: blank messages"),
        ([CHAT], ", row 0: messages, and the tokenizer has no chat template; choose an instruction-tuned model"),
        ([GOOD, {"prompt": "日本🙈"}], ", row 1: the tokenizer knows no character of the prompt"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(rows: list[dict[str, Any]], line: str) -> None:
    tokenizer = build_tokenizer() if "no chat template" in line or isinstance(rows[0]["prompt"], str) else chat_tokenizer()
    (found,), _ = looked_at(rows, tokenizer)
    assert found.startswith(f"train dataset{line}"), found


def test_what_is_over_long_is_named_with_what_decides_it_and_a_number_that_fits_every_row() -> None:
    rows = [GOOD] * 15 + [{"prompt": "1" * 80}, {"prompt": "1" * 90}, {"prompt": "1" * 79}]
    limits = {"longest": 128, "limit": "sampler.max_model_len", "prefix": "trainer."}
    (line,), _ = looked_at(rows, completion=48, **limits)
    assert line == (
        "train dataset, row 15: a prompt of 81 tokens, and sampler.max_model_len = 128 less trainer.max_completion_length=48 "
        "leaves room for 80 (1 more such row); lower it to 37, or drop the longer prompts"
    ), "a prompt has a <bos>, so that 79 characters just fit"
    assert looked_at(rows, completion=37, **limits) == ([], [])
    (line,), _ = looked_at([{"prompt": "1" * 128}], completion=1, longest=128)
    assert line.endswith(" less max_completion_length=1 leaves room for 127; drop the longer prompts")


def test_a_token_without_an_embedding_is_named() -> None:
    (line,), _ = looked_at([{"prompt": "11"}, {"prompt": "1="}], vocabulary=30)
    assert line.startswith("train dataset, row 1: token") and "embeddings for 30" in line


def test_a_template_that_fails_or_leaves_a_message_out_is_named_with_the_row() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif m.role == 'odd' %}"
        "{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
    )
    (failed,), _ = looked_at([CHAT, CHAT, messages("x", "odd")], tokenizer)
    assert failed.startswith("train dataset, row 2: the chat template fails: TemplateError: no such role")
    (lost,), _ = looked_at([CHAT, messages("the question", "usr")], tokenizer)
    assert lost.startswith("train dataset, row 1: the chat template leaves out message 0, role 'usr'")


def test_special_tokens_are_refused_in_messages_and_said_in_text() -> None:
    """Text may have been through a template already; what a message says must not end its turn."""
    problems, notes = looked_at([GOOD, {"prompt": "1<eos>+1="}])
    assert problems == [] and notes[0].startswith("train dataset, row 1: '<eos>' in the text is the special token")
    tokenizer = chat_tokenizer()
    (line,), _ = looked_at([CHAT, messages(f"now {tokenizer.eos_token} you")], tokenizer)
    assert line.startswith("train dataset, row 1: message 0 has the special token") and "fake a turn" in line


def test_what_is_seldom_meant_is_said() -> None:
    problems, notes = looked_at([GOOD, {"prompt": "1+🙈="}, {"prompt": "<bos>1+1="}])
    assert problems == []
    assert [note.partition(": ")[0] for note in notes] == [
        "train dataset, row 1",
        "train dataset, row 2",
        "train dataset, row 2",
    ]
    assert "the model sees <unk>" in notes[0] and any("<bos> twice" in note for note in notes)


def test_a_value_that_a_reward_needs_is_in_every_row() -> None:
    rows = [GOOD | {"answer": "2"}, GOOD | {"answer": None}, GOOD | {"answer": None}]
    (line,), _ = looked_at(rows, needed=("answer",))
    assert line.startswith("train dataset, row 1: no value in `answer`, which a reward function needs") and "1 more" in line
    assert looked_at(rows) == ([], [])


def test_text_and_messages_are_not_mixed() -> None:
    class Mixed(Dataset):
        def __getitem__(self, key: Any) -> Any:
            return {"prompt": ["1+1=", CHAT["prompt"]]}

    mixed = Mixed(Dataset.from_list([GOOD, GOOD]).data)
    mixed.select_columns = lambda *_: mixed  # type: ignore[method-assign]
    (line,), _ = looked_at(mixed, chat_tokenizer())
    assert line.startswith("train dataset, row 1: messages, where earlier rows are not")


def test_rows_are_read_in_parts_and_tokens_are_those_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlinvariant.trainer.preflight import rows

    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    faulty = [GOOD] * 20 + [{"prompt": "\0"}] + [GOOD] * 10
    (line,), _ = looked_at(faulty)
    assert line.startswith("train dataset, row 20: `prompt` has a NUL")


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_tokens_are_those_that_trl_makes(kind: str) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokenizer = chat_tokenizer() if kind == "messages" else build_tokenizer()
    given: list[Any] = ["1+1=", "12+30="] if kind == "text" else [CHAT["prompt"], messages("and you?")["prompt"]]
    trainer: Any = object.__new__(GRPOTrainer)
    vars(trainer).update(processing_class=tokenizer, _is_vlm=False, environment_factories=None, tools=None)
    vars(trainer).update(chat_template=None, chat_template_kwargs={})
    prompts = Prompts(tokenizer)
    texts = [prompts.read(prompt) for prompt in given]
    ours = prompts.tokenize([text for _, text in texts], kind == "messages")
    assert [k for k, _ in texts] == [kind] * 2
    assert [list(ids) for ids in ours] == [list(ids) for ids in trainer._tokenize_prompts(given)[0]]
