"""The page of a demo."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlinvariant.demo.measure import summary
from rlinvariant.report import html
from rlinvariant.text import escaped
from rlinvariant.types import JsonObject

NEWLINE = "\n"


def page(result: JsonObject) -> str:
    """Return demo.html, a page without network or script: the sentences, the curves, the numbers, what was said."""
    arms, options = result["arms"], result["options"]
    css = (Path(html.__file__).parent / "page.css").read_text()
    title = f"One prompt, {options['completions']:,} times, at temperature 0"
    rows = (
        ("unique completions", "unique"),
        ("first token that differs", "first_token"),
        ("unique sequences of log-probs", "unique_logprobs"),
        ("first log-prob that differs, at token", "first_logprob"),
        ("completions as when alone", "as_alone"),
        ("... and their log-probs, bit for bit", "logprobs_as_alone"),
        ("tokens/s", "tokens_per_s"),
    )
    table = "".join(
        f"<tr><th>{label}</th>" + "".join(f"<td>{_number(arm[key])}</td>" for arm in arms.values()) + "</tr>"
        for label, key in rows
    )
    said = "".join(
        f'<tr><th>{name}</th><td>{count:,}</td><td class="text">{_marked(arm["texts"][number], arm["texts"][0])}</td></tr>'
        for name, arm in arms.items()
        for number, count in Counter(arm["of"]).most_common(5)
    )
    sentences = "".join(f"<li>{_text(line.strip())}</li>" for line in summary(result))
    weights = ", random weights" if result["random_weights"] else ""
    given = [f"{k}={v}" for k, v in options.items() if v != "" and k != "run"]  # a second demo needs another name
    command = shlex.join(["rlinvariant", "demo", result["model"], *given])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{css}</style></head><body>
<header><h1>{title}</h1>
<p class="meta">{_text(result["model"])}{weights}, {options["dtype"]}, {_text(result["device"])}: a prompt of
{len(result["prompt_token_ids"])} tokens, while other requests join and leave</p></header>
<ul class="verdict">{sentences}</ul>
<figure style="max-width:720px"><figcaption><b>Different completions so far</b>
<span class="unit">of {options["completions"]:,}, against their length in tokens</span></figcaption>{chart(arms)}</figure>
<div class="wide"><table><thead><tr><th></th><th>stock vLLM</th><th>ours</th></tr></thead><tbody>{table}</tbody></table></div>
<h2>What was said</h2><p class="small">The five most frequent completions of each engine, whole. Marked: the first token
that the most frequent one has not, and what follows it.</p>
<div class="wide"><table><thead><tr><th></th><th>times</th><th class="text">completion</th></tr></thead><tbody>{said}</tbody>
</table></div><h2>Reproduce</h2><pre>{_text(command)}</pre></body></html>
"""


def _marked(tokens: Sequence[str], usual: Sequence[str]) -> str:
    """Return a text in which the first token that differs from the usual text is marked, and what follows it."""
    first = next((i for i, (a, b) in enumerate(zip(tokens, usual, strict=True)) if a != b), len(tokens))
    same, differs, later = "".join(tokens[:first]), "".join(tokens[first : first + 1]), "".join(tokens[first + 1 :])
    marked = f'<mark>{escaped(differs, keep=NEWLINE)}</mark><span class="later">{escaped(later, keep=NEWLINE)}</span>'
    return f'<span class="said-whole">{escaped(same, keep=NEWLINE)}{marked if differs else ""}</span>'


def chart(arms: dict[str, JsonObject]) -> str:
    """Draw how many different beginnings there are at each length, among the tokens and among the log-probs' bits, as SVG."""
    width, height, left, right, top, bottom = 720, 300, 60, 190, 14, 34
    lines = [
        ("ours, tokens and log-probs", arms["ours"]["unique_logprobs_by_token"], "c0"),
        ("stock, log-probs", arms["stock"]["unique_logprobs_by_token"], "c2"),
        ("stock, tokens", arms["stock"]["unique_by_token"], "c1"),
    ]
    length, highest = len(lines[0][1]), max(max(values) for _, values, _ in lines)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if highest / s <= 6)
    ceiling = max(2, -(-highest // step) * step)

    def x(position: float) -> float:
        return left + (position - 1) / max(1, length - 1) * (width - left - right)

    def y(count: float) -> float:
        return height - bottom - (count / ceiling) * (height - top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Different completions by length">']
    for count in range(0, ceiling + 1, step):
        parts.append(f'<path class="grid" d="M{left} {y(count):.1f}H{width - right}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{y(count) + 4:.1f}">{count:,}</text>')
    for position in sorted({1, *(round(length * i / 4) for i in range(1, 5))} - {0}):
        parts.append(f'<text class="step" x="{x(position):.1f}" y="{height - 14}">{position:,}</text>')
    taken: list[float] = []
    for label, values, colour in lines:
        path = "".join(f"{'M' if i == 0 else 'L'}{x(i + 1):.1f} {y(v):.1f}" for i, v in enumerate(values))
        at = y(values[-1])
        while any(abs(at - other) < 15 for other in taken):
            at -= 15
        taken.append(at)
        parts.append(f'<path class="line {colour}" d="{path}"/>')
        parts.append(f'<text x="{width - right + 8}" y="{at + 4:.1f}">{label}: {values[-1]:,}</text>')
    return "".join([*parts, "</svg>"])


def _number(value: float | None) -> str:
    return "no difference seen" if value is None else f"{value:,.0f}"


def _text(text: str) -> str:
    return escaped(text)
