"""JSON that a run has written and that something may have damaged since: read in one way, or refused in one line.

A file is UTF-8. Nesting ends at DEPTH, and a whole number has 64 bits: nothing that is read here can exhaust a recursion, or
become a number that no array holds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.types import Json, JsonObject

DEPTH = 64
RESTORE = "restore it"


def parse(text: bytes | str) -> Json:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none; or it is nested too deeply, or has a number of more than 64 bits.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_int=_int64, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    if text.count("[") + text.count("{") > DEPTH and _is_deeper(value, DEPTH):
        raise ValueError(f"nested more than {DEPTH} deep")
    return value


def read(path: Path, fix: str = RESTORE) -> JsonObject:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        fix: what the user can do if it is damaged, as the message's end.

    Raises:
        UserError: it cannot be read, is not JSON, or holds no object.
    """
    try:
        found = parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error, 120)}); {fix}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}; {fix}")
    return found


def rows(path: Path, *keys: str, size: int | None = None) -> Iterator[JsonObject]:
    """Yield the object of each whole line of a file that grows by lines; a last line without its newline is left out.

    Args:
        path: the file.
        keys: that each row must have, with a whole number.
        size: bytes after which nothing is read.

    Raises:
        UserError: the file cannot be read, or a line is damaged: its number is said.
    """
    expected = " and ".join(["a JSON object", *(f'an integer "{key}"' for key in keys)]).replace(" and ", " with ", 1)
    try:
        with path.open("rb") as lines:
            end = 0
            for number, line in enumerate(lines, start=1):
                end += len(line)
                if not line.endswith(b"\n") or (size is not None and end > size):  # torn by a kill, or not asked for
                    return
                yield _row(line, f"{path}:{number}", expected, keys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from error


def _row(line: bytes, where: str, expected: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = parse(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON ({one_line(error, 80)}); {RESTORE}, or remove that line") from error
    if not isinstance(row, dict) or any(type(row.get(key)) is not int for key in keys):
        raise UserError(f"{where}: expected {expected}; {RESTORE}, or remove that line")
    return row


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"a whole number of {len(text)} digits, which no 64 bits hold")
    return number


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _is_deeper(value: Any, depth: int) -> bool:
    """Tell whether a value has more than `depth` levels, without recursion."""
    level = [value]
    for _ in range(depth + 1):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True
