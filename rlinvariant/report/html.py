"""The report of a run or an ablation as one file: no network, no other file; JavaScript for hovering and for completions."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rlinvariant.files import require_writable, write_atomically
from rlinvariant.report import html_charts, html_explain, html_samples, tables
from rlinvariant.report.panels import REWARD
from rlinvariant.report.study import Run, Study, load
from rlinvariant.text import escaped, plural

HERE = Path(__file__).parent
STYLES = ("vendor/uplot/uPlot.min.css", "page.css", "explain/explain.css")
CHARTS = ("vendor/uplot/LICENSE", "vendor/uplot/uPlot.iife.min.js", "numbers.js", "charts.js")
SCRIPTS = (*CHARTS, "samples.js", "live.js", "explain/explain.js")
FILE = "report.html"


def write(path: str | Path) -> tuple[Path, Study]:
    """Write PATH/report.html of the run or ablation at PATH, in place of an earlier one; return the file and what it shows.

    Raises:
        UserError: as `study.load` and `write_study`.
    """
    study = load(path)
    return write_study(study), study


def write_study(study: Study, file: Path | None = None) -> Path:
    """Write the page of a study to a file, by default where such a page belongs, and return the file.

    Raises:
        UserError: it cannot be written, which is tried before it is made.
    """
    if file is None:
        file = study.path.with_name(f"{study.path.name}.html") if study.kind == "comparison" else study.path / FILE
    require_writable(file, "report", "make room for it there, or name another file with --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, page(study), shared=True)
    return file


def page(study: Study, version: str = "") -> str:
    """Return the whole page. Everything that comes from a run is escaped, and no script but the page's own may run.

    Args:
        version: of a page that a server keeps up to date, what its numbers are of; "": a page that is a file.
    """
    charts, others = (
        {t: inside for t, inside in of.items() if inside} for of in (_charts(study), _parts(study, bool(version)))
    )
    lead = html_charts.legend(study) + html_charts.clocks(study) if charts else ""
    status = '<span id="live-status" role="status">live</span>' if version else ""
    body = [
        f"<header><h1>{_text(_title(study))}</h1>",
        f'<p class="meta">{_text(str(study.path))} {status}</p>{_menu([*charts, *others])}</header>',
        f'<div id="outcome">{_outcome(study)}{_notes(study.notes)}</div>',
        f'<div id="charts">{lead}{_sections(charts)}</div>' if charts else "",
        _sections(others),
        f'<details id="why"><summary>{html_explain.TITLE}: an explanation to play with</summary>',
        f"{html_explain.fragment()}</details>",
    ]
    return document(_title(study), "\n".join(body), version)


def document(title: str, body: str, version: str = "", scripts: Sequence[str] = SCRIPTS, styles: Sequence[str] = STYLES) -> str:
    """Return a page of ours: style and scripts inside, and a policy by which nothing else is loaded or run.

    Args:
        version: as for `page`; with one, the page asks the server that it comes from for what is new.
        scripts, styles: files beside this one.
    """
    css = "".join((HERE / name).read_text() for name in styles)
    script = "\n".join((HERE / name).read_text() for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'" if version else "")
    )
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_text(title)}</title><style>{css}</style></head>",
        f'<body data-version="{_text(version)}">',
    ]
    return "\n".join([*head, body, f"<script>{script}</script></body></html>"]) + "\n"


def _charts(study: Study) -> dict[str, str]:
    """Return the sections that are charts, by title, in the order in which they are read; none without a step."""
    if not any(run.rows for _, run in study.runs):
        return {}
    charts = html_charts.sections(study)
    return {"Reward": charts.pop(REWARD, ""), "Exactness": html_charts.contract(study), **charts}


def _parts(study: Study, live: bool) -> dict[str, str]:
    """Return the sections behind the charts, by title, in the order in which they are read."""
    has_rows = any(run.rows for _, run in study.runs)
    return {
        "Completions": html_samples.section(study, live),
        "Numbers": _summary(study) + (html_charts.absent(study) if has_rows else ""),
        "Reproduce": _reproduce(study),
        "Method": _method(study),
    }


def _menu(titles: Iterable[str]) -> str:
    links = [f'<a href="#{_name(title)}">{_text(title)}</a>' for title in titles]
    return f'<nav aria-label="parts of the page">{"".join(links)}<a href="#why">{html_explain.TITLE}</a></nav>'


def _name(title: str) -> str:
    return title.lower().replace(" ", "-")


def _sections(parts: Mapping[str, str]) -> str:
    return "\n".join(
        f'<section id="{_name(title)}"><h2>{_text(title)}</h2>{inside}</section>' for title, inside in parts.items()
    )


def _title(study: Study) -> str:
    if study.is_single:
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
    return "".join(map(_table, tables.every(study)))


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


def _reproduce(study: Study) -> str:
    run = next((run for _, run in study.runs), None)
    parts = [f"<pre>{_text(study.command)}</pre>"]
    if not study.is_single:
        arms = "".join(
            f'<tr><th scope="row">{_text(arm.name)}</th><td class="text"><code>{_text(" ".join(arm.overrides))}</code></td>'
            f'<td class="word">{_text(", ".join(f"{run.seed}" for run in arm.runs) or "none yet")}</td>'
            f'<td class="text">{_text(_kernels(arm.runs[0]) if arm.runs else "–")}</td></tr>'
            for arm in study.arms
        )
        titles = "".join(f'<th scope="col" class="text">{t}</th>' for t in ("Arm", "Settings", "Seeds", "Kernels"))
        parts.append(f'<div class="wide arms"><table><thead><tr>{titles}</tr></thead><tbody>{arms}</tbody></table></div>')
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
    if gpu := known.get("gpu"):
        yield "GPU", f"{gpu.get('name')}, {gpu.get('memory_gib')} GiB, compute {gpu.get('compute')}, CUDA {gpu.get('cuda')}"
    yield "Kernels", _kernels(run)
    yield "Threads", ", ".join(f"{name} {value}" for name, value in (known.get("threads") or {}).items())
    if known.get("vllm_environment"):
        yield "vLLM", " ".join(f"{name}={value}" for name, value in known["vllm_environment"].items())


def _method(study: Study) -> str:
    said = [
        "Two log-probs are equal when their 32 bits are; KL k3 is the mean of expm1(r) − r over the sampled tokens, "
        "r = trainer's − sampler's log-prob, in float64.",
    ]
    if not study.is_single:
        said.append(
            "Intervals: mean ± t s / √n over n seeds, t the 97.5 % quantile of Student's t with n − 1 degrees of freedom. "
            "Differences are taken between runs of the same seed. No difference seen: the 95 % interval of the differences "
            "holds 0, which is not a proof that there is none. Of twenty comparisons of equal arms, about one will look "
            "different."
        )
    return "".join(f'<p class="small">{_text(line)}</p>' for line in said)
