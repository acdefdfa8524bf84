"""Find completions of a run: by step, prompt or text, and the best or worst of them by a number."""

import heapq
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.files import RUNS
from rlinvariant.report.completions import Completions, dropped
from rlinvariant.report.rundir import RunDir
from rlinvariant.text import shown

Sample = Mapping[str, Any]


def mean_logprob(row: Sample) -> float | None:
    """Return the mean log-prob of a completion's tokens, nats, as it was sampled; None without tokens."""
    logprobs = row.get("sampler_logprobs")
    return None if logprobs is None or not len(logprobs) else float(sum(logprobs) / len(logprobs))


KEYS: dict[str, Callable[[Sample], Any]] = {
    "reward": lambda row: row.get("reward"),
    "length": lambda row: row.get("length"),
    "advantage": lambda row: row.get("advantage"),
    "logprob": mean_logprob,
}
"""Numbers that completions are sorted by; a completion that has none comes last."""


@dataclass(frozen=True)
class Query:
    """Says which completions are wanted.

    Args:
        steps: first and last step; None: all.
        prompt: how the prompt's id begins; "": of every prompt.
        pattern: must be found in the prompt or the completion.
        sort: one of KEYS; "": in order of steps.
        lowest: the lowest first, not the highest.
        most: how many; None: all.
    """

    steps: tuple[int, int] | None = None
    prompt: str = ""
    pattern: re.Pattern[str] | None = None
    sort: str = ""
    lowest: bool = False
    most: int | None = None

    def holds(self, row: Sample) -> bool:
        """Tell whether a completion is wanted."""
        texts = [str(row.get(name) or "") for name in ("prompt", "completion")]
        return str(row.get("prompt_id", "")).startswith(self.prompt) and (
            self.pattern is None or any(self.pattern.search(text) for text in texts)
        )


@dataclass
class Found:
    """Holds the completions that were wanted, in order, how many there were before `most`, and what could not be read."""

    rows: list[dict[str, Any]]
    count: int = 0
    notes: list[str] = field(default_factory=list)


def locate(path: str | Path) -> Path:
    """Return the directory of a run by its path or its name. Raises UserError if there is none, or it is an ablation's."""
    for place in (Path(path), RUNS / path):
        if RunDir(place).config.is_file() or RunDir(place).completions.is_dir():
            return place
        if (place / "ablation.json").is_file():
            runs = sorted(file.parent for file in place.glob("*/seed-*/config.json"))
            fix = f"name one of its runs, as {runs[0]}" if runs else "none of its runs has started"
            raise UserError(f"{path}: is an ablation; {fix}")
    raise UserError(f"{path}: no such run; expected a directory under {RUNS.resolve()}, or its name")


def find(run: Path, kept: Completions, query: Query) -> Found:
    """Read what is asked for of a run that has `kept` completions, a step at a time.

    Raises:
        UserError: there are no completions of these steps.
    """
    first, last = query.steps or (0, 2**63)
    wanted = [step for step in kept.steps if first <= step <= last]
    if not kept.steps:
        raise UserError(f"{run}: no completions were kept")
    if not wanted:
        have = f"there are of steps {kept.steps[0]} to {kept.steps[-1]}"
        raise UserError(f"{run}: no completions of step {first}{f' to {last}' if last != first else ''}; {have}")
    found = Found([])

    def matching() -> Iterator[dict[str, Any]]:
        for step in wanted:
            try:
                rows = kept.read(step)
            except UserError as damage:
                found.notes.append(str(damage))
                continue
            for row in filter(query.holds, rows):
                found.count += 1
                yield row

    if query.sort:
        sign = -1 if query.lowest else 1

        def rank(row: Sample) -> tuple[bool, float]:
            value = KEYS[query.sort](row)
            is_number = isinstance(value, int | float) and value == value
            return is_number, sign * value if is_number else 0.0

        ordered = matching()
        most = query.most
        found.rows = sorted(ordered, key=rank, reverse=True) if most is None else heapq.nlargest(most, ordered, key=rank)
    else:
        for row in matching():
            if query.most is None or len(found.rows) < query.most:
                found.rows.append(row)
    if gone := [step for step in dropped(run) if first <= step <= last]:
        found.notes.append(f"{len(gone)} of these steps were dropped to keep within completions_gib, {gone[0]} first")
    return found


def pattern(text: str) -> re.Pattern[str]:
    """Read what is searched for: /regex/, of Python's kind, or a text in any case. Raises UserError for a wrong regex."""
    if len(text) < 3 or not text.startswith("/") or not text.endswith("/"):  # // is the beginning of a comment
        return re.compile(re.escape(text), re.IGNORECASE)
    try:
        return re.compile(text[1:-1])
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"--search {shown(text, 60)}: no regular expression ({error}); escape it, or leave the slashes"
        ) from error


def step_range(text: str, steps: list[int]) -> tuple[int, int]:
    """Read N, A-B, or `last`. Raises UserError for anything else."""
    if text == "last" and steps:
        return steps[-1], steps[-1]
    if match := re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text):
        return int(match[1]), int(match[2] or match[1])
    raise UserError(f"--step {shown(text, 40)}: expected a step, a range as 10-20, or last")
