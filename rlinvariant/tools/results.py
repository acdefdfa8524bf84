"""Turn what a tool returns into the text that the model reads."""

import json
import re
from collections.abc import Sequence
from typing import Any

from rlinvariant.errors import one_line
from rlinvariant.text import printable, shown
from rlinvariant.types import Untyped

LONGEST = 1 << 16  # characters: what is longer never fits in a completion, and would take minutes to tokenize
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Garbage(Exception):
    """Says why something that a tool returned is no text."""


class Images(Garbage):
    """Says that a tool returned an image, which no text model can read."""


def as_text(returned: Untyped) -> str:
    """Return text as it is, and a number, None, a list or a dict of these as JSON.

    Raises:
        Garbage: it is something else, whose text could hold an address in memory, and so differ in every run.
    """
    if isinstance(returned, str):
        text = str(returned)
    elif _is_image(returned) or (isinstance(returned, list) and any(map(_is_image, returned))):
        raise Images("returned an image; expected text")
    else:
        try:
            text = json.dumps(returned, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise Garbage(f"returned {type(returned).__name__}, expected text, or what JSON can hold") from None
    text = text.encode(errors="replace").decode()  # half a pair of surrogates cannot be tokenized
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [cut after {LONGEST:,} characters]"


def _is_image(part: Any) -> bool:
    return type(part).__module__.startswith("PIL.") or (isinstance(part, dict) and part.get("type") == "image")


def require_plain(text: str, special: Sequence[str]) -> None:
    """Refuse a text in which a special token would end or fake a turn. Raises Garbage."""
    if found := next((token for token in special if token in text), None):
        raise Garbage(f"returned the special token {shown(found)} as text, which would end or fake a turn")


def without(text: str, special: Sequence[str]) -> str:
    """Return a text whose special tokens are words, so that none ends or fakes a turn where the model reads it."""
    for token in sorted(filter(None, special), key=len, reverse=True):
        text = text.replace(token, "(special token)")
    return text


def error_text(error: BaseException) -> str:
    """Say what a tool raised, without what differs from run to run."""
    if isinstance(error, Garbage):
        return str(error)
    try:
        said = one_line(error)
    except Exception:  # an exception's own __str__ may fail
        said = "without a readable message"
    said = "" if said == type(error).__name__ else f": {said}"
    return printable(ADDRESS.sub("", f"{type(error).__name__}{said}"))
