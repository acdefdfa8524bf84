"""The page's part about completions: some of what a run has said, to search, sort and compare; a few without scripts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.report.completions import Completions, telling
from rlinvariant.report.rundir import RunDir
from rlinvariant.report.search import mean_logprob
from rlinvariant.report.study import Study
from rlinvariant.text import escaped, plural, printable

CHARACTERS = 2000  # shown of a prompt or a completion
BYTES = 800_000  # of the completions on a page, all runs together
STEPS, ROWS = 40, 64  # at most, of a run, and of a step
TOKENS = 1000  # of a completion whose tokens are coloured

Sample = Mapping[str, Any]


def section(study: Study) -> str:
    """Return the part for a run, or for the first seed of each arm of an ablation; "" where nothing was kept."""
    static: list[str] = []
    runs: list[dict[str, Any]] = []
    first = [(f"{arm.name}, seed {run.seed}", run.path) for arm in study.arms for run in arm.runs[:1]]
    for name, path in first:
        try:
            kept = Completions(path)
            if not kept.steps:
                continue
            static += _few(kept, "" if study.is_single else name)
            runs.append({"name": name} | _chosen(kept, path, BYTES // len(first)))
        except (UserError, OSError) as error:
            static.append(f'<p class="small">{escaped(str(error))}</p>')
    if not (static or runs):
        return ""
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")
    app = f'<div id="said"></div><script type="application/json" id="said-data">{data}</script>' if runs else ""
    few = '<p class="small">Best, worst and median of the first and the last step, of different prompts:</p>'
    return f"{app}{few}{''.join(static)}"


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
    numbers = {"r": row.get("reward"), "a": row.get("advantage"), "l": row.get("length"), "m": mean_logprob(row)}
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
        small["q"] = [None if x is None else max(-99, round(10 * x)) if x == x else 0 for x in by_token]
    return small


def _shown(text: str) -> str:
    cut = f"… cut: the first {CHARACTERS:,} of {len(text):,} characters" if len(text) > CHARACTERS else ""
    return printable(text[:CHARACTERS], keep="\n") + cut


def _units(text: str) -> int:
    """Return a text's length as the page's script counts it: an emoji is two units of UTF-16."""
    return len(text.encode("utf-16-le")) // 2


class _Pieces:
    """Cuts a completion's text at its tokens, by the tokenizer of the run's newest checkpoint, if it has one."""

    def __init__(self, run: Path) -> None:
        self._tokenizer: Any = None
        found = sorted(RunDir(run).checkpoints.glob("checkpoint-*/tokenizer.json"), key=lambda file: file.stat().st_mtime)
        if found:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(str(found[-1]))
            except Exception:  # the library's only kind of error: a page without colours
                return

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
