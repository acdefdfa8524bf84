"""The explanation of why temperature 0 is not deterministic: a part of every report, and a page of its own, docs/explain."""

from functools import cache
from pathlib import Path

HERE = Path(__file__).parent / "explain"
TITLE = "Why temperature 0 is not deterministic"


@cache
def fragment() -> str:
    """Return the explanation as HTML, with what was recorded for it; its script and style are the page's."""
    recorded = (HERE / "recorded.json").read_text().strip().replace("<", "\\u003c")
    text = (HERE / "explain.html").read_text()
    return f'<div id="explain">{text}<script type="application/json" id="explain-data">{recorded}</script></div>'


def page() -> str:
    """Return the explanation as a page of its own, which needs no network."""
    from rlinvariant.report import html

    scripts, styles = ("explain/explain.js",), ("page.css", "explain/explain.css")
    body = f'<main id="why"><h1>{TITLE}</h1>{fragment()}</main>'
    return html.document(TITLE, body, scripts=scripts, styles=styles)
