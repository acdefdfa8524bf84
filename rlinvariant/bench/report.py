"""The JSON files as Markdown: printed, or put between the markers of the documentation's pages."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlinvariant.bench import tables
from rlinvariant.bench.tables import Result
from rlinvariant.files import write_atomically

RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"<!-- (?:([\w.-]+)/)?([\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)
TITLE = "Time as a multiple of stock's"
CURVES = "Reward, KL, importance ratios, gradient norm, entropy and length by step, of each arm: mean over seeds, 95 % interval"


def main(directory: Path | None, pages: Sequence[Path]) -> None:
    """Print every table of `directory`, or of all results; with `pages`, fill those instead."""
    directories = [directory] if directory is not None else sorted({path.parent for path in RESULTS.glob("*/*.json")})
    found = {one.name: read(one) for one in directories}
    for page in pages:
        update(page, found)
        print(page)
    if not pages:
        print("\n\n".join(map(markdown, directories)))


def markdown(directory: Path) -> str:
    """Return every table of a directory, each below a heading."""
    return "\n\n".join(tables.section(name, content) for name, content in read(directory).items())


def read(directory: Path) -> dict[str, Result]:
    """Return the results in a directory, by name; the certificates of its families are one of them, "families"."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    found = {name: content for name, content in found.items() if {"rows", "runs", "arms", "refused"} & content.keys()}
    if certificates := [json.loads(path.read_text()) for path in sorted((directory / "certificates").glob("*.json"))]:
        found["families"] = {"refused": {}} | found.get("families", {}) | {"certificates": certificates}
    return found


def update(page: Path, found: Mapping[str, Mapping[str, Result]]) -> None:
    """Put a table between `<!-- DIRECTORY/NAME -->` and `<!-- end -->`, for each such pair of markers in a page.

    Without a directory, `cpu` is meant. Three names are special: `headline` is the README's table, made of several results;
    `cost` is a figure, drawn to cost-DIRECTORY.svg beside the page; `drift` is one, drift-DIRECTORY.svg, and tables. A result
    that is not there leaves "not measured yet"; what a directory that is not in `found` gave stays as it is.
    """

    def replaced(match: re.Match[str]) -> str:
        marker, place, name = match[0].partition("\n")[0], match[1] or "cpu", match[2]
        if place not in found:
            return match[0]
        if name == "headline":
            text = tables.headline(found)
        elif name == "cost":
            text = _figure(page.with_name(f"cost-{place}.svg"), found[place])
        elif name == "drift" and name in found[place]:
            drawn = _curves(page.with_name(f"drift-{place}.svg"), found[place][name])
            text = f"{drawn}\n\n{tables.table(name, found[place][name])}"
        else:
            text = tables.table(name, found[place].get(name))
        return f"{marker}\n{text}\n<!-- end -->"

    write_atomically(page, MARKED.sub(replaced, page.read_text()))


def _figure(file: Path, results: Mapping[str, Result]) -> str:
    from rlinvariant.bench.figure import bars, draw  # matplotlib, which only developers have

    if not (some := bars(results)):
        return "not measured yet"
    draw(some, file)
    return f"![{TITLE}]({file.name})"


def _curves(file: Path, content: Result) -> str:
    from rlinvariant.bench.figure import draw_curves

    draw_curves(content, file)
    return f"![{CURVES}]({file.name})"
