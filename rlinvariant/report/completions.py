"""All that a run has said: RUN/completions/step-000012.parquet, a row for each completion that step 12 drew.

Columns are those of `trainer.samples`, each reward as one of its own, `rewards/NAME`, and `extra` as JSON. pandas and datasets
read the files as they are; each page has a checksum, so that a damaged file is seen. A step that uses an earlier rollout again
drew nothing, and has no file.

Where the files would take more than the run may keep, some are deleted, and RUN/completions-dropped.json lists their steps: the
first and the last step stay, and of the others the older ones stand further apart.

Runs of earlier versions have samples.jsonl, a few completions of a few steps; `Completions` gives these, too.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import reading
from rlinvariant.errors import UserError, one_line
from rlinvariant.files import write_atomically
from rlinvariant.report.rundir import RunDir, kept
from rlinvariant.types import JsonObject

if TYPE_CHECKING:
    import pyarrow

Sample = Mapping[str, Any]
REWARD = "rewards/"  # how the columns of single reward functions begin
SCHEMA = {"rlinvariant": "1"}  # in each file, of what its columns mean
GIB = 2**30


def write(run: str | Path, rows: Sequence[Sample], limit_gib: float | None = None) -> Path:
    """Write what one step has drawn, in place of an earlier file of that step; rows are those of `trainer.samples`.

    Args:
        limit_gib: what all files together may take; the step's own is written in any case. None: no limit.
    """
    import pyarrow
    import pyarrow.parquet

    packed = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_table(rows), packed, compression="zstd", write_page_checksum=True)
    path = RunDir(run).completions / f"step-{rows[0]['step']:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, packed.getvalue().to_pybytes())
    if limit_gib is not None:
        _thin(run, limit_gib * GIB)
    return path


def files(run: str | Path) -> dict[int, Path]:
    """Return the file of each step that has one, ascending."""
    found = ((re.fullmatch(r"step-(\d+)\.parquet", path.name), path) for path in RunDir(run).completions.glob("step-*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def dropped(run: str | Path) -> list[int]:
    """Return the steps whose files were deleted to keep within the limit. Raises UserError if their list is damaged."""
    path = RunDir(run).completions_dropped
    steps = reading.read(path).get("steps") if path.exists() else []
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        raise UserError(f"{path}: expected a list of steps; {reading.RESTORE}, or remove it")
    return steps


def read(path: Path) -> list[JsonObject]:
    """Return the rows of a file, rewards and extra as dictionaries. Raises UserError if it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True, use_threads=False)
        rows = table.to_pylist()
        for row in rows:
            names = [key for key in row if key.startswith(REWARD)]
            row["rewards"] = {name.removeprefix(REWARD): row.pop(name) for name in names}
            row["extra"] = reading.parse(row["extra"]) if row["extra"] else {}
        if not rows or any(type(row["step"]) is not int or type(row["sample_id"]) is not int for row in rows):
            raise ValueError("no completions")
        return rows
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged ({one_line(error, 120)}); remove it, the other steps can be read")


class Completions:
    """Gives what a run has said, a step at a time: of this version's files, or of samples.jsonl.

    Attributes:
        steps: which have completions, ascending.

    Raises:
        UserError: samples.jsonl is damaged.
    """

    def __init__(self, run: str | Path) -> None:
        self._files = files(run)
        self._old: dict[int, list[dict[str, Any]]] = {}
        if os.path.lexists(path := RunDir(run).samples):
            for row in reading.rows(path, "step"):
                rows = self._old.setdefault(row["step"], [])
                rows.append({**row, "sample_id": len(rows)})
        self.steps = sorted({*self._files, *self._old})

    def read(self, step: int) -> list[JsonObject]:
        """Return the rows of one of `steps`. Raises UserError if its file is damaged."""
        return read(self._files[step]) if step in self._files else self._old[step]

    def rewards(self, most: int) -> dict[int, list[float]]:
        """Return what the completions of at most `most` steps, spread over the run, were given; UserError as `read`."""
        count = min(most, len(self.steps))
        chosen = [self.steps[i * (len(self.steps) - 1) // max(1, count - 1)] for i in range(count)]
        found = {step: self._rewards_of(step) for step in chosen}
        return {step: rewards for step, rewards in found.items() if rewards}

    def _rewards_of(self, step: int) -> list[float]:
        if step not in self._files:
            return [row["reward"] for row in self._old[step] if isinstance(row.get("reward"), int | float)]
        import pyarrow
        import pyarrow.parquet

        try:
            column = pyarrow.parquet.read_table(self._files[step], columns=["reward"], use_threads=False)["reward"]
            return [reward for reward in column.to_pylist() if reward is not None and math.isfinite(reward)]
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            raise _damaged(self._files[step], error) from error

    def __iter__(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        return ((step, self.read(step)) for step in self.steps)


def telling(rows: Iterable[Sample]) -> list[Sample]:
    """Return the best, the worst and the median completion by reward: of different prompts, if there are as many."""
    rewarded = [row for row in rows if isinstance(row.get("reward"), int | float)]  # of samples.jsonl, perhaps not
    ranked = sorted(rewarded, key=lambda row: -row["reward"])
    prompts = [row.get("prompt_id", str(row.get("prompt"))) for row in ranked]
    chosen: list[int] = []
    for wanted in (0, len(ranked) - 1, len(ranked) // 2):
        left = [i for i in range(len(ranked)) if i not in chosen]
        left = [i for i in left if prompts[i] not in {prompts[k] for k in chosen}] or left
        chosen += sorted(left, key=lambda i: abs(i - wanted))[:1]
    return [ranked[i] for i in chosen]


def forget(run: str | Path, after: int) -> None:
    """Delete what was drawn by the steps after one, over which a resumed run goes again; all of it is set aside instead."""
    directory = RunDir(run)
    if after == 0 and files(run):
        os.replace(directory.completions, kept(directory.completions))
        directory.completions_dropped.unlink(missing_ok=True)
    for step, path in files(run).items():
        if step > after:
            path.unlink()
    if gone := dropped(run):
        _write_dropped(run, [step for step in gone if step <= after])


def _table(rows: Sequence[Sample]) -> "pyarrow.Table":
    """Lay rows out in columns of fixed types, the same in every file of a run."""
    import pyarrow as pa

    ids, logprobs = pa.list_(pa.int32()), pa.list_(pa.float32())
    first = {"step": pa.int32(), "prompt_id": pa.string(), "group": pa.int32(), "sample_id": pa.int32()}
    texts = {"prompt": pa.string(), "completion": pa.string()}
    rewards = {REWARD + _valid(name): pa.float32() for name in rows[0]["rewards"]}
    numbers = {"reward": pa.float32(), "advantage": pa.float32(), "length": pa.int32(), "truncated": pa.bool_()}
    tools = {"tool_mask": pa.list_(pa.int8()), "tool_results": pa.list_(pa.string())}
    tokens = {
        "token_ids": ids,
        **tools,
        "sampler_logprobs": logprobs,
        "trainer_logprobs": logprobs,
        "mismatched_tokens": pa.int32(),
    }
    last = {"prompt_token_ids": ids, "extra": pa.string()}
    columns = first | texts | rewards | numbers | tokens | last
    flat = [
        {
            **row,
            "prompt": _valid(row["prompt"]),
            "completion": _valid(row["completion"]),
            **{REWARD + _valid(name): value for name, value in row["rewards"].items()},
            "tool_results": None if row["tool_results"] is None else [_valid(text) for text in row["tool_results"]],
            "extra": json.dumps(row["extra"], default=str) if row["extra"] else None,
        }
        for row in rows
    ]
    arrays = [pa.array([row[name] for row in flat], kind) for name, kind in columns.items()]
    return pa.Table.from_arrays(arrays, schema=pa.schema(columns.items(), SCHEMA))


def _valid(text: str) -> str:
    """Return a text that UTF-8 can hold: a lone surrogate as its escape."""
    return text.encode(errors="backslashreplace").decode()


def _thin(run: str | Path, limit: float) -> None:
    """Delete files until the rest is within the limit: each time the one that leaves the smallest gap for its age."""
    paths = files(run)
    sizes = {step: path.stat().st_size for step, path in paths.items()}
    stay, gone, total = list(sizes), [], sum(sizes.values())
    while total > limit and len(stay) > 2:
        last = stay[-1]
        at = min(range(1, len(stay) - 1), key=lambda i: (stay[i + 1] - stay[i - 1]) / (last - stay[i]))
        gone.append(stay.pop(at))
        total -= sizes[gone[-1]]
    if gone:
        _write_dropped(run, sorted({*dropped(run), *gone}))
        for step in gone:
            paths[step].unlink()


def _write_dropped(run: str | Path, steps: Sequence[int]) -> None:
    write_atomically(RunDir(run).completions_dropped, json.dumps({"why": "completions_gib", "steps": steps}) + "\n")
