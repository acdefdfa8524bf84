"""The user's own file of rows, `data.path=`, as recipes read it."""

import os
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.hub import hub_refusal
from rlinvariant.launch import asks_the_hub, main_process_fetches
from rlinvariant.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST_LINE = 1 << 24  # bytes that are read of the first line, to see what it is


def first_line(path: str) -> str:
    """Return the first line of a file, or as much of it as tells that it is no row.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"data.path={shown(path)}: no such file")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline(LONGEST_LINE)
    except OSError as error:
        raise UserError(f"data.path={shown(path)}: cannot be read ({error.strerror})") from error


def read(kind: str, path: str, key: str = "data.path", **options: Any) -> "Dataset":
    """Return the rows of a file.

    Args:
        kind: the loader of `datasets` for it: "json", "parquet" or "csv".
        path: the file.
        key: the setting that names the file, for messages.
        options: of the loader.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()  # one would stand in the middle of our own lines
    try:
        return load_dataset(kind, data_files=path, split="train", **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise unreadable(f"{key}={shown(path)}", error) from error


def unreadable(where: str, error: Exception) -> UserError:
    """Return the line that refuses a file: `datasets` itself says that none was generated, and its cause says why."""
    return UserError(f"{where}: cannot be read: {one_line(error.__cause__ or error)}; mend the file")


def of_hub(hub: str, subset: str | None, split: str, fix: str) -> "Dataset":
    """Return a split of a data set on the hub.

    Args:
        hub: its id.
        subset: name of its configuration; None: there is one.
        split: name of the split.
        fix: what helps without the hub, for the message.

    Raises:
        UserError: it cannot be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if asks_the_hub() and (refusal := hub_refusal(hub, "dataset")):
        raise UserError(f"{hub}: cannot be had from the hub: {refusal}, or {fix}")
    try:
        with main_process_fetches(hub):
            return load_dataset(hub, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{hub}: cannot be had from the hub: {cause}; log in or go online, or {fix}") from error
