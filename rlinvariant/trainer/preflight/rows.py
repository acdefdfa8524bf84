"""The rows of a data set, checked before anything is trained on them."""

from collections.abc import Sequence
from typing import Any

from rlinvariant.errors import UserError


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse a dataset that is empty, has a row without `prompt`, or asks for what is not supported."""
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise UserError(f"{name} dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise UserError(f"{name} dataset: expected at least one row, found none")
    columns: Sequence[str] = dataset.column_names
    found = f"columns found: {', '.join(columns)}"
    if "prompt" not in columns:
        raise UserError(f"{name} dataset, row 0: no `prompt`; {found}")
    for index, prompt in enumerate(dataset["prompt"]):
        if not prompt:
            raise UserError(f"{name} dataset, row {index}: no `prompt`, found {prompt!r}; {found}")
    for column in ("image", "images", "tools"):
        if column in columns:
            raise UserError(f"{name} dataset: column `{column}` is not supported, only text prompts; drop it")
