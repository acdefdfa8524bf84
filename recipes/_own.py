"""Training without a recipe: rows of the user's, `data.path=`, and the reward functions of `reward=`.

A row has a `prompt`, text or chat messages, and whatever columns the reward functions take.
"""

import csv
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.launch import rank
from rlinvariant.recipes import _rows
from rlinvariant.text import plural, say, shown

if TYPE_CHECKING:
    from datasets import Dataset

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Ending of a file -> the loader of `datasets` that reads it."""
EXPECTED = "expected a file (.jsonl, .json, .parquet, .csv), a directory of save_to_disk, or a hub id"
NO_ROWS = "no rows; give a file with some"


@chz.chz
class Data(BaseData):
    path: str | None = chz.field(default=None, doc="Rows with a `prompt`: a file, a directory of save_to_disk, or a hub id.")
    subset: str | None = chz.field(default=None, doc="Configuration of a data set on the hub.")
    split: str | None = chz.field(default=None, doc="Split to train on, where there are several; None: train.")
    eval_path: str | None = chz.field(default=None, doc="Rows to hold out, as path.")
    eval_split: str | None = chz.field(default=None, doc="Split to hold out, of path.")
    eval_size: int = chz.field(default=0, doc="Rows held out: of eval_path or eval_split, else of path; 0: all there, or none.")
    seed: int = chz.field(default=0, doc="Seed of the choice of held-out rows.")


def check(config: Config) -> list[str]:
    """List what is wrong with `data.*`, one line each. Reads no row."""
    data, found = config.data, []
    if not config.reward and config.environment is None:
        found.append("reward: missing; write reward=FILE.py:FUNCTION, or recipe=NAME, which has one")
    if data.path is None:
        found.append(f"data.path: missing; {EXPECTED}, or recipe=NAME, which has data")
    for key in ("path", "eval_path"):
        if (path := getattr(data, key)) is not None and (wrong := _wrong(path)):
            found.append(f"data.{key}={shown(path)}: {wrong}")
    if data.path is not None and os.path.isfile(data.path):
        for key in ("subset", "split", "eval_split"):
            if (value := getattr(data, key)) is not None:
                found.append(f"data.{key}={shown(value)}: data.path={shown(data.path)} is one file, without splits; remove it")
    if data.eval_path is not None and data.eval_split is not None:
        found.append(f"data.eval_path={shown(data.eval_path)} and data.eval_split={shown(data.eval_split)}: keep one")
    if data.eval_size < 0:
        found.append(f"data.eval_size={data.eval_size}: expected 0 or more")
    if not 0 <= data.seed < 2**32:
        found.append(f"data.seed={data.seed}: expected 0 to 4294967295")
    return found


def _wrong(path: str) -> str | None:
    """Say why a path holds no rows, without reading them."""
    if os.path.isfile(path):
        if Path(path).suffix not in FILES:
            return f"expected a name that ends in {', '.join(FILES)}"
        return None if os.path.getsize(path) else "an empty file; give one with rows"
    if os.path.isdir(path):
        marks = ("dataset_info.json", "dataset_dict.json")
        return None if any(os.path.isfile(os.path.join(path, mark)) for mark in marks) else f"no data set in it; {EXPECTED}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and Path(path).suffix not in FILES and not os.path.isdir(Path(path).parent):
        return None
    return f"no such file; {EXPECTED}"


def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset | None]":
    """Return training and held-out rows; no prompt is in both."""
    data = config.data
    rows = _load("path", data.path, data.subset, data.split)
    held_out = None
    if data.eval_path is not None:
        held_out = _load("eval_path", data.eval_path, data.subset, None)
    elif data.eval_split is not None:
        held_out = _load("path", data.path, data.subset, data.eval_split)
    if data.eval_size:
        pool = rows if held_out is None else held_out
        most = len(pool) - (pool is rows)  # at least one is left to train on
        if data.eval_size > most:
            raise UserError(
                f"data.eval_size={data.eval_size}: expected at most {most}, of {plural(len(pool), 'row')}; lower it"
            )
        held_out = pool.select(sorted(random.Random(f"eval {data.seed}").sample(range(len(pool)), data.eval_size)))
    return rows if held_out is None else _without(rows, held_out, data.path), held_out


def _without(rows: "Dataset", held_out: "Dataset", path: str) -> "Dataset":
    """Return the rows whose prompt is not held out, and say how many those are."""
    prompts = set(map(_key, held_out["prompt"]))
    kept = [index for index, prompt in enumerate(rows["prompt"]) if _key(prompt) not in prompts]
    said = f"data.path={shown(path)}: {len(kept):,} of {plural(len(rows), 'row')} to train on, {len(held_out):,} held out"
    if not kept:
        raise UserError(f"{said}: every prompt is held out; give other rows, or lower data.eval_size")
    if rank() == 0:
        say(f"{said}; no prompt is in both")
    return rows.select(kept)


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=repr)


def _load(key: str, path: str, subset: str | None, split: str | None) -> "Dataset":
    """Return the rows of a file, a directory or a split on the hub. Raises UserError where it has none, or no `prompt`."""
    where = f"data.{key}={shown(path)}"
    if os.path.isfile(path):
        options = _as_text(path, where) if path.endswith(".csv") else {}
        rows = _rows.read(FILES[Path(path).suffix], path, f"data.{key}", **options)
    elif os.path.isdir(path):
        rows = _of_directory(path, where, split)
    else:
        rows = _rows.of_hub(path, subset, split or "train", f"give data.{key}=FILE with its rows")
    if not len(rows):
        raise UserError(f"{where}: {NO_ROWS}")
    columns: Sequence[str] = rows.column_names
    if "prompt" not in columns:
        raise UserError(f"{where}: no column `prompt`; columns found: {shown(', '.join(columns))}; rename one")
    return rows


def _as_text(path: str, where: str) -> dict[str, Any]:
    """Return the options by which every value of a CSV file is text: 007 stays what it is, and NA is no missing value.

    Raises:
        UserError: a row has another number of fields than the header, by which pandas would shift columns; a column has
            no name, or the name of another; there are no rows.
    """
    from datasets import Features, Value

    lines = _csv_lines(path, where)
    line, columns = next(lines, (1, []))
    for number, column in enumerate(columns, 1):
        if not column.strip():
            raise UserError(f"{where}:{line}: column {number} of {len(columns)} has no name; name it, or take it out")
        if columns.count(column) > 1:
            raise UserError(f"{where}:{line}: two columns `{shown(column)}`; rename one")
    any_row = False
    for line, values in lines:
        any_row = True
        if len(values) != len(columns):
            found = f"{plural(len(values), 'value')}, and the header names {plural(len(columns), 'column')}"
            raise UserError(f'{where}:{line}: {found}; mend the row, with "..." around a value that has a comma')
    if not any_row:
        raise UserError(f"{where}: {NO_ROWS}")
    return {"features": Features({column: Value("string") for column in columns}), "keep_default_na": False}


def _csv_lines(path: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the values of each line of a CSV file that is not blank, with the number of the line where they begin."""
    csv.field_size_limit(2**31 - 1)  # a prompt may be long
    line = 1
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # -sig: Excel begins a file with a BOM
            reader = csv.reader(file)
            for values in reader:
                if len(values) > 1 or "".join(values).strip():
                    yield line, values
                line = reader.line_num + 1
    except (OSError, csv.Error) as error:
        raise _rows.unreadable(f"{where}:{line}", error) from error


def _of_directory(path: str, where: str, split: str | None) -> "Dataset":
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        found = load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
        raise _rows.unreadable(where, error) from error
    if not isinstance(found, DatasetDict):
        if split is not None:
            raise UserError(f"{where}: one data set without splits, and {shown(split)} was asked for; remove data.split")
        return found
    there = list(map(str, found))
    if (name := split or "train") not in there:
        fix = "choose by data.split or data.eval_split"
        raise UserError(f"{where}: no split {shown(name)}; there are {', '.join(there)}; {fix}")
    return found[name]


def reward_funcs(config: Config) -> list[Any]:
    """Return none: they are those of `reward=`, which `check` requires."""
    return []
