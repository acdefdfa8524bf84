"""The report of a run or an ablation as one file: no network, no other file; JavaScript for hovering and for completions."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlinvariant.files import require_writable, write_atomically
from rlinvariant.report import html_samples, stats, svg, tables
from rlinvariant.report.panels import Panel
from rlinvariant.report.study import Run, Study, load, measured
from rlinvariant.text import escaped, plural

HERE = Path(__file__).parent
SHORT_RUN_STEPS = 200  # up to so many, every single step can be seen
FILE = "report.html"


def write(path: str | Path) -> tuple[Path, Study]:
    """Write PATH/report.html of the run or ablation at PATH, in place of an earlier one; return the file and what it shows.

    Raises:
        UserError: as `study.load`; the page cannot be written, which is tried before it is made.
    """
    study = load(path)
    file = study.path / FILE
    require_writable(file, "report", "make room for it there")
    write_atomically(file, page(study))
    return file, study


def page(study: Study) -> str:
    """Return the whole page. Everything that comes from a run is escaped, and no script but the page's own may run."""
    css, script = (HERE / "page.css").read_text(), "".join((HERE / name).read_text() for name in ("page.js", "samples.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = _title(study)
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_text(title)}</title><style>{css}</style></head><body>",
    ]
    body = [
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="meta">{_text(str(study.path))}</p></header>',
        _outcome(study),
        _notes(study.notes),
        _summary(study),
        *_curves(study),
        html_samples.section(study),
        _reproduce(study),
        _method(study),
        f"<script>{script}</script></body></html>",
    ]
    return "\n".join([*head, *(part for part in body if part)]) + "\n"


def _title(study: Study) -> str:
    if not study.is_ablation:
        return f"{study.recipe}: {study.arms[0].name}, {plural(study.steps, 'step')}"
    seeds = len({run.seed for _, run in study.runs})
    sizes = (len(study.arms), "arm"), (seeds, "seed"), (study.steps, "step")
    return f"{study.recipe}: {', '.join(plural(*size) for size in sizes)}"


def _text(text: str) -> str:
    return escaped(text)


def _outcome(study: Study) -> str:
    lines = "".join(f"<li><b>{_text(who)}:</b> {_text(what)}</li>" for who, what in tables.sentences(study))
    return f'<ul class="verdict">{lines}</ul>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes" aria-label="notes">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"


def _summary(study: Study) -> str:
    found = [tables.summary(study), tables.differences(study)]
    return "<h2>Numbers</h2>" + "".join(_table(table) for table in found if table is not None)


def _table(table: tables.Table) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in table.head)
    lines = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{_text(cell.text)}{_said(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{_text(first.text)}</th>{cells}</tr>')
    caption = f'<p class="meta">{_text(table.caption)}</p>'  # outside of what scrolls: on a narrow screen it would be cut
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'{caption}<div class="wide"><table>{inside}</table></div>'


def _said(cell: tables.Cell) -> str:
    return f'<span class="said{" differs" * cell.differs}">{_text(cell.said)}</span>' if cell.said else ""


def _curves(study: Study) -> Iterator[str]:
    """Yield a section for each group of panels; a panel that no run has a finite number for is left out, and named."""
    if not any(run.rows for _, run in study.runs):
        return
    sections: dict[str, list[str]] = {}
    absent = []
    for panel in study.panels:
        if lines := _lines(study, panel):
            drawn = svg.chart(panel.title, panel.unit, lines, panel.scale)
            sections.setdefault(panel.section, []).append(_figure(panel.title, panel.unit, panel.notice, drawn))
        elif any(panel.shown_for(run.config) for _, run in study.runs):
            absent.append(panel.title)
    if study.is_ablation:
        for measure in (m for m in measured(study) if m in (stats.REWARD, stats.HELD_OUT, stats.ACCURACY)):
            notice = "" if measure is stats.REWARD else f" After training, greedy.{_before(study, measure)}"
            if drawn := _seeds(study, measure, notice):
                sections.setdefault("Learning", []).append(drawn)
    legend = _legend(study)
    for section, figures in sections.items():
        yield f'<h2>{_text(section)}</h2>{legend}<div class="panels">{"".join(figures)}</div>'
        legend = ""
    if absent:
        yield f'<p class="small">Not drawn, as no run has a number for it: {_text(", ".join(absent))}.</p>'


def _before(study: Study, measure: stats.Measure) -> str:
    """Say where held-out rewards were before training; "" where no run says it."""
    before = [v for _, run in study.runs if (v := run.result.get("heldout_reward_before")) is not None]
    ends = [tables.number(value, measure.style) for value in (min(before), max(before))] if before else []
    return f" Before it: {' to '.join(ends)}." if ends else ""


def _figure(title: str, unit: str, notice: str, drawn: str) -> str:
    caption = f'<b>{_text(title)}</b> <span class="unit">{_text(unit)}</span><span class="notice">{_text(notice)}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _lines(study: Study, panel: Panel) -> list[svg.Line]:
    """Return a line for each arm that has at least one finite value."""
    lines = []
    for index, arm in enumerate(study.arms):
        runs = [rows for run in arm.runs if panel.shown_for(run.config) and (rows := run.rows_of(panel))]
        if not runs:
            continue
        steps = np.array(sorted({row["step"] for rows in runs for row in rows}))
        values, present = np.full((len(runs), len(steps)), math.nan), np.zeros((len(runs), len(steps)), bool)
        running, window = values.copy(), _window(study) if panel.of == "steps" else 1
        for i, rows in enumerate(runs):
            at = np.searchsorted(steps, [row["step"] for row in rows])
            values[i, at], present[i, at] = panel.values(rows), True
            running[i, at] = stats.running_mean(values[i, at], window)
        mean, low, high = stats.curve(running, present)
        if np.isfinite(mean).any():
            raw = mean if window == 1 else stats.curve(values, present)[0]
            lines.append(svg.Line(arm.name, index, steps, mean, low, high, raw))
    return lines


def _window(study: Study) -> int:
    """Return over how many steps the curves of a long run are averaged, an odd number; 1 for a short one."""
    longest = max(len(run.rows) for _, run in study.runs)
    return 1 if longest <= SHORT_RUN_STEPS else longest // 50 | 1


def _seeds(study: Study, measure: stats.Measure, notice: str) -> str:
    """Return one number of every run, a row for each arm: an interval hides which seed collapsed. "" where no run has one."""
    rows = []
    for index, arm in enumerate(study.arms):
        seeds = [value for run in arm.runs if math.isfinite(value := measure.of(run.rows, run.result))]
        if seeds:
            rows.append((arm.name, index, stats.estimate(seeds), seeds))
    if not rows:
        return ""
    title, _, unit = measure.title.partition(", ")
    notice = f"Dots: seeds; upright: their mean; line: 95 % interval.{notice}"
    return _figure(title, unit, notice, svg.dots(title, rows, measure.style == "percent"))


def _legend(study: Study) -> str:
    lines = [
        f"<li>{svg.swatch(i)}<div><b>{_text(arm.name)}</b> <span>{_text(arm.description)}</span></div></li>"
        for i, arm in enumerate(study.arms)
    ]
    seeds, window = max((len(arm.runs) for arm in study.arms), default=0), _window(study)
    curves = f"running means over {window} steps" if window > 1 else "each step"
    said = f"Lines: {curves}, mean over seeds; shading: its 95 % interval." if seeds > 1 else f"Lines: {curves}; no intervals."
    if window > 1:
        said += " Thin lines: single steps, of each pixel column the least and the greatest."
    return (f'<ul class="legend">{"".join(lines)}</ul>' if study.is_ablation else "") + f'<p class="small">{said}</p>'


def _reproduce(study: Study) -> str:
    run = next((run for _, run in study.runs), None)
    parts = ["<h2>Reproduce</h2>", f"<pre>{_text(study.command)}</pre>"]
    if study.is_ablation:
        arms = "".join(
            f'<tr><th scope="row">{_text(arm.name)}</th><td class="text"><code>{_text(" ".join(arm.overrides))}</code></td>'
            f'<td class="word">{_text(", ".join(f"{run.seed}" for run in arm.runs) or "none yet")}</td>'
            f'<td class="text">{_text(_kernels(arm.runs[0]) if arm.runs else "–")}</td></tr>'
            for arm in study.arms
        )
        titles = "".join(f'<th scope="col" class="text">{t}</th>' for t in ("Arm", "Settings", "Seeds", "Kernels"))
        parts.append(f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{arms}</tbody></table></div>')
    if run is not None:
        facts = "".join(
            f'<tr><th scope="row">{_text(k)}</th><td class="text">{_text(v)}</td></tr>' for k, v in _environment(run)
        )
        parts.append(f'<div class="wide"><table><tbody>{facts}</tbody></table></div>')
    return "".join(parts)


def _kernels(run: Run) -> str:
    return "; ".join(f"{name}: {value}" for name, value in (run.environment.get("kernels") or {}).items()) or "–"


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    known = run.environment
    cpu, git = known.get("cpu") or {}, known.get("git") or {}
    if git:
        yield "Commit", f"{git.get('commit')}{', with changes that are not committed' if git.get('modified') else ''}"
    if known.get("packages"):
        yield "Packages", ", ".join(f"{name} {version}" for name, version in known["packages"].items())
    yield "Python", str(known.get("python", "–"))
    yield "Platform", str(known.get("platform", "–"))
    if cpu:
        isa = " ".join(name for name, there in (cpu.get("isa") or {}).items() if there)
        yield "CPU", f"{cpu.get('model')}, {cpu.get('cores')} cores, {isa}"
    if known.get("gpu"):
        yield "GPU", json.dumps(known["gpu"])
    yield "Kernels", _kernels(run)
    yield "Threads", ", ".join(f"{name} {value}" for name, value in (known.get("threads") or {}).items())
    if known.get("vllm_environment"):
        yield "vLLM", " ".join(f"{name}={value}" for name, value in known["vllm_environment"].items())


def _method(study: Study) -> str:
    said = [
        "Two log-probs are equal when their 32 bits are; KL k3 is the mean of expm1(r) − r over the sampled tokens, "
        "r = trainer's − sampler's log-prob, in float64.",
    ]
    if study.is_ablation:
        said.append(
            "Intervals: mean ± t s / √n over n seeds, t the 97.5 % quantile of Student's t with n − 1 degrees of freedom. "
            "Differences are taken between runs of the same seed. No difference seen: the 95 % interval of the differences "
            "holds 0, which is not a proof that there is none. Of twenty comparisons of equal arms, about one will look "
            "different."
        )
    return "<h2>Method</h2>" + "".join(f'<p class="small">{_text(line)}</p>' for line in said)
