"""Recorded rollouts: RUN/rollouts/step-K.npz, all that step K drew, for `rlinvariant replay`.

A file holds flat arrays, of all requests in order: `prompts` and `completions` (int32 token ids, with `prompt_lengths` and
`completion_lengths`), `logprobs` (fp32, one per completion token), `seeds` (int64), `max_tokens` (int32; files of earlier
versions have none: one number holds for all), `batches` (int32, the batch of each request: a turn of a rank), and `about`,
JSON: the rest of the rollout, and what the run says of itself. It is written whole, and each array has a CRC: a damaged file is
seen.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlinvariant import reading
from rlinvariant.errors import UserError, one_line
from rlinvariant.files import write_atomically
from rlinvariant.report.rundir import SCHEMA, RunDir, quoted
from rlinvariant.rollout import ALL_TOKENS, Batch, Completion, Rollout, Truncation
from rlinvariant.types import JsonObject, JsonRow


def write(run: str | Path, step: int, rollout: Rollout, about: JsonRow) -> Path:
    """Write what `step` drew, in place of an earlier file of that step; `about`, JSON, comes back from `read`."""
    prompts = [p for batch in rollout.batches for p in batch.prompts]
    completions = rollout.completions
    arrays = {
        "prompts": np.asarray([t for p in prompts for t in p], np.int32),
        "prompt_lengths": np.asarray([len(p) for p in prompts], np.int32),
        "completions": np.asarray([t for c in completions for t in c.token_ids], np.int32),
        "completion_lengths": np.asarray([len(c.token_ids) for c in completions], np.int32),
        "logprobs": np.asarray([x for c in completions for x in c.sampler_logprobs], np.float32),
        "seeds": np.asarray([s for batch in rollout.batches for s in batch.seeds], np.int64),
        "max_tokens": np.asarray([most for _, _, most in rollout.requests], np.int32),
        "batches": np.repeat(np.arange(len(rollout.batches), dtype=np.int32), [len(b.prompts) for b in rollout.batches]),
    }
    sampling = {
        "temperature": rollout.temperature,
        "max_tokens": rollout.max_tokens,
        "stop_token_ids": list(rollout.stop_token_ids),
        "weights_sha256": rollout.weights_sha256,
        "truncation": asdict(rollout.truncation),
    }
    text = json.dumps({"schema": SCHEMA, "step": step, "sampling": sampling, "run": dict(about)})
    packed = io.BytesIO()
    np.savez_compressed(packed, about=np.asarray(text), **arrays)
    path = _path(run, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, packed.getvalue())
    return path


def read(run: str | Path, step: int) -> tuple[Rollout, JsonObject]:
    """Return the rollout of a step, and the `about` written with it. UserError where it was not recorded or is damaged."""
    path = _path(run, step)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        about = reading.parse(str(found["about"]))
        if about["schema"] != SCHEMA:
            raise UserError(
                f"{path}: expected schema {SCHEMA}, found {quoted(about['schema'])}: of another version of rlinvariant"
            )
        prompts, ids, logprobs = (
            _split(found[name], found[f"{of}_lengths"])
            for name, of in (("prompts", "prompt"), ("completions", "completion"), ("logprobs", "completion"))
        )
        completions = [Completion(i, x) for i, x in zip(ids, logprobs, strict=True)]
        seeds, numbers = found["seeds"].tolist(), found["batches"].tolist()
        most = found["max_tokens"].tolist() if "max_tokens" in found else [about["sampling"]["max_tokens"]] * len(seeds)
        requests = list(zip(prompts, seeds, completions, most, numbers, strict=True))
        batches = []
        for number in dict.fromkeys(numbers):
            of = [r for r in requests if r[4] == number]
            batches.append(Batch([r[0] for r in of], [r[1] for r in of], [r[2] for r in of], [r[3] for r in of]))
        return Rollout(batches, **_sampling(about["sampling"])), dict(about["run"])
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged byte leads them to
        raise UserError(f"{path}: damaged ({one_line(error, 120)})") from error


def steps(run: str | Path) -> list[int]:
    """Return the steps that were recorded, ascending."""
    names = (re.fullmatch(r"step-(\d+)\.npz", file.name) for file in RunDir(run).rollouts.glob("step-*.npz"))
    return sorted(int(name[1]) for name in names if name)


def forget(run: str | Path, after: int) -> None:
    """Delete what was drawn by the steps after one, over which a resumed run goes again."""
    for step in steps(run):
        if step > after:
            _path(run, step).unlink()


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _path(run: str | Path, step: int) -> Path:
    return RunDir(run).rollouts / f"step-{step}.npz"


def _sampling(found: dict[str, Any]) -> dict[str, Any]:
    """Return how a rollout was drawn. Raises ValueError if a value is of another type than `write` gives it."""
    is_count = {
        "max_tokens": type(found["max_tokens"]) is int,
        "stop_token_ids": all(type(x) is int for x in found["stop_token_ids"]),
    }
    truncation = found.get("truncation", {})  # a recording of before there was one has none
    kinds = {name: type(value) for name, value in asdict(ALL_TOKENS).items()}
    right = is_count | {
        "truncation": {name: type(value) for name, value in truncation.items()} in ({}, kinds),
        "temperature": type(found["temperature"]) in (int, float),
        "weights_sha256": type(found["weights_sha256"]) is str,
    }
    if wrong := [name for name, ok in right.items() if not ok]:
        raise ValueError(f"{wrong[0]} is {quoted(found.get(wrong[0]))}")
    return found | {"truncation": Truncation(**truncation)}


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[list[Any]]:
    ends = [0, *accumulate(lengths.tolist())]
    if ends[-1] != len(flat):
        raise ValueError(f"{len(flat)} values for {ends[-1]} tokens")
    values = flat.tolist()
    return [values[a:b] for a, b in pairwise(ends)]
