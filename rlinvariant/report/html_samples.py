"""The page's part about completions: some of what a run has said."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.report import completions
from rlinvariant.report.study import Study
from rlinvariant.text import escaped

CHARACTERS = 2000  # shown of a prompt or a completion


def section(study: Study) -> str:
    """Return the best, worst and median completion of a run's first and last step, or of an ablation's arms the last best."""
    found: list[str] = []
    for arm in study.arms:
        for run in arm.runs[:1]:
            try:
                steps = _ends(run.path)
            except UserError as error:
                found.append(f'<p class="small">{escaped(str(error))}</p>')
                continue
            rows = [row for rows in steps for row in completions.telling(rows)]
            for row in rows[-3:-2] if study.is_ablation else rows:
                found.append(_sample(row, f"{arm.name}, seed {run.seed}" if study.is_ablation else ""))
    return "<h2>Samples</h2>" + "".join(found) if found else ""


def _ends(run: Path) -> list[list[dict[str, Any]]]:
    """Return the completions of the first step that has some, and of the last."""
    kept = completions.Completions(run)
    return [kept.read(step) for step in sorted({*kept.steps[:1], *kept.steps[-1:]})]


def _sample(row: Mapping[str, Any], where: str) -> str:
    reward = row.get("reward")
    shown = f"{reward:.3f}" if isinstance(reward, int | float) else str(reward)
    place = ", ".join(x for x in (where, f"step {row['step']}", f"reward {shown}") if x)
    return (
        f'<dl class="sample"><dt>sampled</dt><dd>{escaped(place)}</dd>'
        f"<dt>prompt</dt><dd>{_cut(row.get('prompt'))}</dd><dt>completion</dt><dd>{_cut(row.get('completion'))}</dd></dl>"
    )


def _cut(value: Any) -> str:
    """Return a text as it is, but for what cannot be seen or could be obeyed; a long one is cut, and the page says so."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    note = ""
    if len(text) > CHARACTERS:
        note = f'<span class="small">cut: the first {CHARACTERS:,} of {len(text):,} characters</span>'
        text = text[:CHARACTERS]
    return f"<pre>{escaped(text, keep=chr(10))}</pre>{note}"
