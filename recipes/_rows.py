"""The user's own file of rows, `data.path=`, as recipes read it."""

import os
from typing import TYPE_CHECKING

from rlinvariant.errors import UserError, one_line
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


def read(kind: str, path: str) -> "Dataset":
    """Return the rows of a file; `kind` is the loader of `datasets` for it, "json" or "parquet". UserError if it cannot."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(kind, data_files=path, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        cause = one_line(error.__cause__ or error)  # of the rows; the error itself says that a dataset was not generated
        raise UserError(f"data.path={shown(path)}: cannot be read: {cause}; mend the file") from error
