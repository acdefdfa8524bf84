"""Numbers in sentences, and text that came from outside, each in one way everywhere."""

import html
import sys


def plural(count: int, noun: str, many: str = "") -> str:
    """Return a count with its noun: `1 seed`, `2 seeds`, `1,200 tokens`; `many` is the plural where an s is not enough."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def percent(share: float) -> str:
    """Return a share of 1 in per cent, with one decimal: `68.8 %`."""
    return f"{100 * share:.1f} %"


def printable(text: str, keep: str = "") -> str:
    """Write control characters, and others that cannot be seen, as escapes; those in `keep` stay."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def escaped(text: str, keep: str = "") -> str:
    """Write a text into HTML, between tags or in an attribute, as `printable` shows it."""
    return html.escape(printable(text, keep))


def say(text: str, error: bool = False) -> None:
    """Print lines to stdout, or to stderr, without what a terminal would obey; whoever has a Console uses that."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(printable(text, keep="\n").encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def shown(value: object, most: int = 200) -> str:
    """Write what a user has given into a line: without control characters, and cut after `most` characters."""
    text = printable(str(value))
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
