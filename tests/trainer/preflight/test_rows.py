"""A data set that is wrong is refused by a line that says where."""

from typing import Any

import pytest
from datasets import Dataset

from rlinvariant.errors import UserError
from rlinvariant.trainer.preflight.rows import check_dataset


def test_datasets_that_are_wrong_are_named() -> None:
    def refused(dataset: Any) -> str:
        with pytest.raises(UserError) as raised:
            check_dataset(dataset, "train")
        return str(raised.value)

    assert refused(Dataset.from_dict({"question": ["1+1="], "answer": ["2"]})) == (
        "train dataset, row 0: no `prompt`; columns found: question, answer"
    )
    assert refused(Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}, {"answer": "4"}])) == (
        "train dataset, row 2: no `prompt`, found None; columns found: prompt"
    )
    assert refused(Dataset.from_dict({"prompt": [[], [{"role": "user", "content": "hi"}]]})) == (
        "train dataset, row 0: no `prompt`, found []; columns found: prompt"
    )
    assert refused(Dataset.from_dict({"prompt": []})) == "train dataset: expected at least one row, found none"
    assert refused([{"prompt": "a"}]) == "train dataset: expected a datasets.Dataset, got list"
    assert refused(Dataset.from_dict({"prompt": ["a"], "image": ["b"]})) == (
        "train dataset: column `image` is not supported, only text prompts; drop it"
    )


def test_good_datasets_pass() -> None:
    check_dataset(Dataset.from_dict({"prompt": ["1+1="]}), "train")
    check_dataset(Dataset.from_dict({"prompt": [[{"role": "user", "content": "hi"}]]}), "train")
