"""The run directory: runs/NAME/ with config.json, environment.json, metrics.jsonl; result.json at the end.

`checkpoints/` and `model/` are written by the trainer, `rollouts/` by `report.rollouts`, `completions/` by
`report.completions`. A run of an earlier version has samples.jsonl.

Only the main process writes. A .json file is replaced whole; a .jsonl file grows by whole lines, each flushed to the
disk, so a killed run leaves every row it appended. JSON has no NaN and no infinities: they are written as the strings
"NaN", "Infinity" and "-Infinity", and `read_metrics` gives the floats back.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from rlinvariant import held_out, keys, reading
from rlinvariant.errors import UserError
from rlinvariant.files import sync_directory, unwritable, write_atomically
from rlinvariant.machine import environment
from rlinvariant.text import shown
from rlinvariant.types import Json, JsonObject, JsonRow

SCHEMA = 1  # of the files of a run and of an ablation: runs of two of them are not compared
LARGEST = 1e100  # of a number that a report draws
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunDir:
    """Stands for a run directory that exists; `RunDir.create` makes or resumes one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.result = self.path / "result.json"
        self.checkpoints = self.path / "checkpoints"
        self.rollouts = self.path / "rollouts"
        self.first_adapter = self.rollouts / "adapter"
        self.completions = self.path / "completions"
        self.completions_dropped = self.path / "completions-dropped.json"
        self.model = self.path / "model"

    @property
    def is_there(self) -> bool:
        """Say whether a run has begun there, whatever it has left."""
        return self.config.is_file() and self.environment.is_file()

    @classmethod
    def create(cls, path: str | Path, config: JsonRow, resume: bool = False, logs: Mapping[str, int] | None = None) -> Self:
        """Make the directory and write config.json; with `resume`, continue one that a run left, if there is one.

        On resume a config.json that differs is kept as config.1.json, ...; a result.json, which would no longer be true, as
        result.1.json, ... A log that is cut back to nothing, as no checkpoint builds on it, is kept in the same way.

        Args:
            path, config: the directory, and what config.json holds.
            resume: whether the directory may hold a run.
            logs: file -> bytes to which it is cut back, 0 for one that is not named: what the checkpoint builds on. None: only
                a torn last line is cut off.

        Raises:
            UserError: not resuming and the directory holds files; a line of what a run left is damaged; it cannot be written.
            DiskError: the disk is full, or broken.
        """
        run = cls(path)
        try:
            if not resume and (run.config.exists() or run.metrics.exists()):
                raise UserError(f"run: {run.path} already holds a run; choose another run=NAME, or set resume=true")
            run.path.mkdir(parents=True, exist_ok=True)
            for lines, needed in ((run.metrics, ["step"]), (run.samples, [])):
                if lines == run.samples and not os.path.lexists(lines):
                    continue
                size = None if logs is None else logs.get(lines.name, 0)
                if size == 0 and lines.is_file() and lines.stat().st_size:
                    os.replace(lines, kept(lines))
                repair(lines, *needed, size=size)
            text = _json_text(config)
            if run.config.exists() and run.config.read_bytes() != text.encode():
                write_atomically(kept(run.config), run.config.read_bytes())
            if run.result.exists():
                os.replace(run.result, kept(run.result))
            write_atomically(run.config, text)
        except OSError as error:
            raise unwritable(run.path, error.strerror, "run", "choose another run=NAME", error.errno) from error
        return run

    @property
    def is_finished(self) -> bool:
        """Return whether the run has come to its end; where it stopped before, result.json says why."""
        return self.read_result().get("finished") is True

    def read_config(self) -> dict[str, JsonObject]:
        """Return config.json: each key with its value and source. Raises UserError if it is missing or damaged."""
        config = reading.read(self.config)
        for key, entry in config.items():
            if not isinstance(entry, dict) or "value" not in entry:
                expected = '{"value": ..., "source": ...}'
                raise UserError(f"{self.config}: {shown(key)} is {quoted(entry)}, expected {expected}; {reading.RESTORE}")
        return config

    def read_result(self) -> JsonObject:
        """Return result.json, {} if there is none; keys of earlier versions have today's names. Raises UserError if damaged."""
        result = numbers(reading.read(self.result)) if os.path.lexists(self.result) else {}
        result = {held_out.OLD.get(key, key): value for key, value in result.items()}
        for key in held_out.result({}):
            if (value := result.get(key)) is not None and not isinstance(value, int | float):
                raise UserError(f"{self.result}: {key} is {quoted(value)}, expected a number or null; {reading.RESTORE}")
        return result

    def write_environment(self, extra: JsonRow) -> None:
        """Write environment.json: what `machine.environment()` finds, and `extra` (kernels actually used) over it."""
        write_atomically(self.environment, _json_text({"schema": SCHEMA} | environment() | dict(extra)))

    def write_result(self, result: JsonRow) -> None:
        """Write result.json: finished, outcome, error (or null), what `held_out.result` says, seconds."""
        write_atomically(self.result, _json_text(result))

    def append_metrics(self, row: JsonRow) -> None:
        """Append the one row of a step, or a row of an evaluation, which has a `kind`; it is on the disk when this returns.

        Raises:
            ValueError: the row has no integer "step".
            TypeError: a value has no JSON form.
        """
        if type(row.get("step")) is not int:
            raise ValueError(f'a metrics row needs an integer "step", got {row.get("step")!r}')
        _append_lines(self.metrics, [row])


def read_metrics(path: str | Path, size: int | None = None) -> list[JsonObject]:
    """Read the steps' rows of a metrics.jsonl, or of the run directory that holds it, in order, with the keys of today.

    A row takes the place of every earlier row of the same or a later step: those are of the stretch that a resumed run
    went back over. A last line without its newline was torn by a kill and is left out. Only the first `size` bytes are read.

    Raises:
        UserError: the file cannot be read, or any other line is not a JSON object with an integer "step" (file and line number
            given).
    """
    return read_rows(path, size)[0]


def read_rows(path: str | Path, size: int | None = None) -> tuple[list[JsonObject], list[JsonObject]]:
    """Read the steps' rows, as `read_metrics` does, and those of evaluations, whose `step` is how many steps were trained.

    Evaluations of a stretch that a resumed run went back over are left out, too.

    Raises:
        UserError: as `read_metrics`.
    """
    path = Path(path)
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for row in reading.rows(path if path.suffix == ".jsonl" else path / "metrics.jsonl", "step", size=size):
        if row.get("kind") == keys.EVALUATED:
            evaluations.append(numbers(row))
            continue
        for kind in (steps, evaluations):
            while kind and kind[-1]["step"] >= row["step"]:
                kind.pop()
        steps.append(keys.renamed(numbers(row)))
    return steps, evaluations


def quoted(value: Json) -> str:
    """Return a value of a file for a message: as JSON, and cut."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def numbers(row: JsonRow) -> JsonObject:
    """Return a row with the floats that JSON has no form for, which were written as strings; beyond LARGEST is infinite.

    So no sum, square or power of ten of what a reader draws can overflow.
    """

    def number(value: Any) -> Any:
        if isinstance(value, str):
            return _NONFINITE.get(value, value)
        return math.copysign(math.inf, value) if isinstance(value, float) and abs(value) > LARGEST else value

    return {key: number(value) for key, value in row.items()}


def gaps(rows: Sequence[JsonRow], last: int = 0) -> str:
    """Say which steps have no row, from the first one to `last` or the last that has one: "3, 7 to 9"; "" if none is missing.

    Args:
        rows: as `read_metrics` gives them.
        last: the last step that must have a row.
    """
    steps = [0, *(row["step"] for row in rows)]
    holes = [(a + 1, b - 1) for a, b in pairwise([*steps, max(last, steps[-1]) + 1]) if b > a + 1]
    said = [f"{a}" if a == b else f"{a} to {b}" for a, b in holes]
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


def jsonable(value: Json) -> Json:
    """Return a value as JSON can hold it: arrays as lists, floats that are not finite as texts. TypeError if it has no form."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n"


def _append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows)
    with path.open("ab") as file:
        file.write(text.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def kept(path: Path) -> Path:
    """Return the name under which what a file holds now is kept: config.1.json for the first config.json, and so on."""
    return path.with_name(f"{path.stem}.{sum(1 for _ in path.parent.glob(f'{path.stem}.*{path.suffix}')) + 1}{path.suffix}")


def repair(path: Path, *keys: str, size: int | None = None) -> None:
    """Make a file that grows by lines fit to go on: create it if it is missing, and drop what follows its last newline.

    Args:
        path: the file.
        keys: that each row must have, with a whole number.
        size: bytes after which everything is dropped too.

    Raises:
        UserError: a line that would stay is damaged; its number is said, and the file is left as it is.
    """
    path.touch()
    for _ in reading.rows(path, *keys, size=size):
        pass
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read(-1 if size is None else size).rfind(b"\n") + 1)
        os.fsync(file.fileno())
    sync_directory(path.parent)
