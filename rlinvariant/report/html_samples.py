"""The page's part about completions: some of what a run has said, to search, sort and compare; a few without scripts."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.report import search
from rlinvariant.report.completions import Completions, telling
from rlinvariant.report.rundir import RunDir
from rlinvariant.report.study import Study
from rlinvariant.text import escaped, plural, printable
from rlinvariant.types import JsonObject

CHARACTERS = 2000  # shown of a prompt or a completion
BYTES = 4_000_000  # of the completions on a page, all runs together
STEPS, ROWS = 100, 128  # at most, of a run, and of a step
TOKENS = 1000  # of a completion whose tokens are coloured

Sample = Mapping[str, Any]


def shown_runs(study: Study, live: bool) -> list[tuple[str, Path]]:
    """Return name and directory of the runs whose completions are shown: the first seed of each arm, and of a live page all."""
    return [(f"{arm.name}, seed {run.seed}", run.path) for arm in study.arms for run in (arm.runs if live else arm.runs[:1])]


def section(study: Study, live: bool = False) -> str:
    """Return the part for the runs of `shown_runs`; "" where nothing was kept.

    Args:
        live: whether a server answers for the completions (`answer`), so that the page has their steps alone.
    """
    static: list[str] = []
    runs: list[dict[str, Any]] = []
    those = shown_runs(study, live)
    for index, (name, path) in enumerate(those):
        try:
            kept = Completions(path)
            if not kept.steps:
                continue
            if live:
                steps = [{"step": step} for step in kept.steps]
                runs.append({"name": name, "index": index, "said": "All that there are.", "steps": steps})
                continue
            static += _few(kept, "" if study.is_single else name)
            runs.append({"name": name} | _chosen(kept, path, BYTES // len(those)))
        except (UserError, OSError) as error:
            static.append(f'<p class="small">{escaped(str(error))}</p>')
    if not (static or runs):
        return ""
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")
    app = f'<div id="said"></div><script type="application/json" id="said-data">{data}</script>' if runs else ""
    few = '<p class="small">Best, worst and median of the first and the last step, of different prompts:</p>' if static else ""
    return f"{app}{few}{''.join(static)}"


def answer(study: Study, asked: Mapping[str, str]) -> JsonObject:
    """Return what a live page asks for: {"rows": ..., "count": how many there are, "notes": ...}.

    Args:
        asked: `run`, an index of `shown_runs`; `step`, or all; `search`; `sort`, a key of `search.KEYS`; `lowest`; `most`.

    Raises:
        UserError: there is no such run, step, or key; nothing is there to be read.
    """
    try:
        _, path = shown_runs(study, live=True)[int(asked.get("run", 0))]
        steps = (int(asked["step"]), int(asked["step"])) if "step" in asked else None
        most, lowest, sort = int(asked.get("most", 60)), asked.get("lowest") == "1", asked.get("sort", "")
        if sort and sort not in search.KEYS:
            raise ValueError(sort)
    except (IndexError, ValueError) as error:
        raise UserError(f"no such completions: {one_line(error, 80)}") from error
    wanted = search.pattern(asked["search"]) if asked.get("search") else None
    found = search.find(path, Completions(path), search.Query(steps, "", wanted, sort, lowest, most))
    pieces, rows = _Pieces(path), []
    for row in found.rows:
        prompts: dict[str, int] = {}
        rows.append(_row(row, prompts, pieces) | {"step": row["step"], "prompt": _shown(next(iter(prompts)))})
    return {"rows": rows, "count": found.count, "notes": found.notes}


def _few(kept: Completions, where: str) -> Iterator[str]:
    """Yield the best, the worst and the median completion of the first and the last step; of an arm the last step's best."""
    steps = kept.steps[-1:] if where else sorted({kept.steps[0], kept.steps[-1]})
    for row in [row for step in steps for row in telling(kept.read(step))[: 1 if where else None]]:
        reward = row.get("reward")
        shown = f"{reward:.3f}" if isinstance(reward, int | float) else str(reward)
        place = ", ".join(x for x in (where, f"step {row['step']}", f"reward {shown}") if x)
        yield (
            f'<dl class="sample"><dt>sampled</dt><dd>{escaped(place)}</dd>'
            f"<dt>prompt</dt><dd>{_cut(row.get('prompt'))}</dd><dt>completion</dt><dd>{_cut(row.get('completion'))}</dd></dl>"
        )


def _cut(value: Any) -> str:
    """Return a text as it is, but for what cannot be seen or could be obeyed; a long one is cut, and the page says so."""
    text, note = _plain(value), ""
    if len(text) > CHARACTERS:
        note = f'<span class="small">cut: the first {CHARACTERS:,} of {len(text):,} characters</span>'
    return f"<pre>{escaped(text[:CHARACTERS], keep=chr(10))}</pre>{note}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _chosen(kept: Completions, run: Path, room: int) -> dict[str, Any]:
    """Return what the page's script gets of a run: the last step, the first, and as many between as there is room for."""
    pieces, steps, left, most = _Pieces(run), {}, room, 0
    for step in _spread(kept.steps)[:STEPS]:
        rows = kept.read(step)
        most = max(most, len(rows))
        prompts: dict[str, int] = {}
        packed = {"step": step, "rows": [_row(row, prompts, pieces) for row in _groups(rows)]}
        packed["prompts"] = [_shown(prompt) for prompt in prompts]
        left -= len(json.dumps(packed))
        if left < 0 and steps:
            break
        steps[step] = packed
    shown = max(len(packed["rows"]) for packed in steps.values())
    said = f"On this page: {plural(len(steps), 'step')} of {len(kept.steps):,} that drew completions"
    said += f", at most {shown:,} of {most:,} completions each" if shown < most else ""
    said += f". All there are: rlinvariant samples {printable(str(run))}"
    return {"said": said, "steps": [steps[step] for step in sorted(steps)]}


def _spread(steps: Sequence[int]) -> list[int]:
    """Return steps in an order whose every beginning is spread over all: the last, the first, the middle, the quarters, ..."""
    order, parts = [len(steps) - 1, 0], 1
    while parts < len(steps):
        parts *= 2
        order += [len(steps) * i // parts for i in range(1, parts, 2)]
    return [steps[i] for i in dict.fromkeys(order)]


def _groups(rows: Sequence[Sample]) -> list[Sample]:
    """Return whole groups of a step, those of its best, worst and median completion first, then the others, up to ROWS."""
    order = dict.fromkeys([row.get("group") for row in telling(rows)] + [row.get("group") for row in rows])
    chosen: list[Sample] = []
    for group in order:
        of = [row for row in rows if row.get("group") == group]
        if chosen and len(chosen) + len(of) > ROWS:
            break
        chosen += of[:ROWS]
    return sorted(chosen, key=lambda row: row["sample_id"])


def _row(row: Sample, prompts: dict[str, int], pieces: "_Pieces") -> dict[str, Any]:
    """Return a completion with short keys; of its tokens, where each ends in the text and its log-prob in tenths of a nat.

    A token that was not sampled has None for a log-prob.
    """
    prompt, text = _plain(row.get("prompt")), _plain(row.get("completion"))
    small = {"i": row["sample_id"], "p": prompts.setdefault(prompt, len(prompts)), "c": _shown(text)}
    numbers = {"r": row.get("reward"), "a": row.get("advantage"), "l": row.get("length"), "m": search.mean_logprob(row)}
    small |= {key: round(x, 4) for key, x in numbers.items() if isinstance(x, int | float) and abs(x) < 1e100}
    small |= {"t": 1} if row.get("truncated") else {}
    small |= {"d": row["mismatched_tokens"]} if row.get("mismatched_tokens") else {}
    if isinstance(rewards := row.get("rewards"), dict) and len(rewards) > 1:
        each = (f"{name} {value:.3f}" for name, value in rewards.items() if isinstance(value, int | float))
        small["e"] = printable(", ".join(each))
    if len(text) <= CHARACTERS and (found := pieces.of(row, text)):
        small["n"] = list(accumulate(_units(printable(piece, keep="\n")) for piece in found))
        given = iter(row["sampler_logprobs"])
        by_token = [next(given) if sampled else None for sampled in row.get("tool_mask") or [1] * len(found)]
        if row.get("trainer_logprobs") and not row.get("tool_mask"):
            pairs = zip(row["trainer_logprobs"], row["sampler_logprobs"], strict=False)
            small["x"] = [float(f"{d:.2g}") if math.isfinite(d := a - b) else 99.0 for a, b in pairs]
        small["q"] = [None if x is None else _tenths(x) for x in by_token]
    return small


def _tenths(logprob: float) -> int:
    return 0 if math.isnan(logprob) else round(min(0.0, max(-99.0, 10 * logprob)))


def _shown(text: str) -> str:
    cut = f"… cut: the first {CHARACTERS:,} of {len(text):,} characters" if len(text) > CHARACTERS else ""
    return printable(text[:CHARACTERS], keep="\n") + cut


def _units(text: str) -> int:
    """Return a text's length as the page's script counts it: an emoji is two units of UTF-16."""
    return len(text.encode("utf-16-le")) // 2


@lru_cache(maxsize=4)
def _tokenizer(file: Path, written_ns: int) -> Any:
    """Return the tokenizer of a file as it was written then, or None if it is none; a live page asks often."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library's only kind of error: a page without colours
        return None


class _Pieces:
    """Cuts a completion's text at its tokens, by the tokenizer of the run's model or its newest checkpoint, if it has one."""

    def __init__(self, run: Path) -> None:
        files = RunDir(run)
        places = [*files.checkpoints.glob("checkpoint-*/tokenizer.json"), *files.model.glob("tokenizer.json")]
        found = sorted(places, key=lambda file: file.stat().st_mtime)
        self._tokenizer: Any = _tokenizer(found[-1], found[-1].stat().st_mtime_ns) if found else None

    def of(self, row: Sample, text: str) -> list[str]:
        """Return a text for each token, "" for one that has none; [] where they do not make up the completion."""
        ids = row.get("token_ids")
        if self._tokenizer is None or not ids or len(ids) > TOKENS or not row.get("sampler_logprobs"):
            return []
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=row.get("tool_mask") is None)  # those that end turns are part of the text
        try:
            found = [stream.step(self._tokenizer, token) or "" for token in ids]
        except Exception:  # of another tokenizer
            return []
        return found if "".join(found) == text else []
