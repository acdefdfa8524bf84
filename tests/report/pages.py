"""Parts of a page as a reader finds them: its text, a figure, the curves of a panel."""

import re
from html.parser import HTMLParser

KL = "KL, sampler to trainer (k3)"
HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "</pre></dl><style>body{display:none}</style>\x1b[2J\x1b]0;pwned\x07[bold red]\u202edwp&amp;"
)


def text_of(page: str) -> str:
    """Return the text of the page that a reader sees, without tags."""
    found = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader().feed(re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL))
    return "".join(found)


def figure(page: str, title: str) -> str:
    return next(part for part in page.split("<figure>")[1:] if f"<b>{title}</b>" in part)


def curves(page: str, title: str) -> dict[str, str]:
    """{label: path} of the lines of one panel."""
    return dict(re.findall(r'data-label="([^"]*)" d="([^"]*)"', figure(page, title)))
