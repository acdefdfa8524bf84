"""Damages to the files of a run: every byte-level kind for each file, and wrong types in every place that a reader looks at."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = 100_000
HOSTILE = "<script>\x1b[2J\x1b]8;;http://evil\x1b\\\u202e\ud800[red]"
WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "fraction": 1.5,
    "huge": 1e308,
    "2^63": 2**63,
    "text": "x",
    "empty text": "",
    "hostile": HOSTILE,
    "long text": "9" * 100_000,
    "empty list": [],
    "list": [1, "x"],
    "empty object": {},
    "object": {"a": [1]},
}
RAW = {  # texts of JSON that json.dumps does not write
    "infinite": "1e999",
    "NaN": "NaN",
    "5,000 digits": "9" * 5000,
    "list too deep": "[" * DEEP + "]" * DEEP,
    "object too deep": '{"a":' * DEEP + "1" + "}" * DEEP,
    "900 deep": "[" * 900 + "]" * 900,
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "cut in the middle": lambda old: old[: len(old) // 2],
    "cut by a byte": lambda old: old[:-1],
    "cut by two bytes": lambda old: old[:-2],
    "zeros": lambda old: bytes(len(old)),
    "binary junk": lambda old: bytes((i * 167 + 13) % 256 for i in range(5000)),
    "junk in the middle": lambda old: old[: len(old) // 2] + b"\xff\xfe\x00\x1b[2J" + old[len(old) // 2 :],
    "junk, then a line": lambda old: b"\xff\xfe\n" + old,
    "UTF-16": lambda old: old.decode("latin-1").encode("utf-16"),
    "byte order mark": lambda old: b"\xef\xbb\xbf" + old,
    "twice": lambda old: old + old,
    "newlines": lambda old: b"\n" * 1000,
    "a list": lambda old: b"[]\n",
    "a number": lambda old: b"3\n",
    "a text": lambda old: b'"text"\n',
    "null": lambda old: b"null\n",
    "an empty object": lambda old: b"{}\n",
    **{name: lambda old, text=text: text.encode() + b"\n" for name, text in RAW.items()},
}


def on_the_file(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each damage to a file as a whole, with what does it."""

    def replaced(make: Callable[[], object]) -> Callable[[], object]:
        return lambda: (path.unlink(), make())

    for name, change in BYTES.items():
        yield name, lambda change=change: path.write_bytes(change(path.read_bytes()))
    yield "missing", path.unlink
    yield "a directory", replaced(path.mkdir)
    yield "a link to nothing", replaced(lambda: path.symlink_to("nothing"))
    yield "a link to itself", replaced(lambda: path.symlink_to(path.name))
    if os.geteuid() != 0:  # root may read everything
        yield "no permission", lambda: path.chmod(0)


def in_the_values(path: Path, places: list[tuple[str, ...]]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield wrong values at each place of a JSON object, or of the second line of a file of lines."""
    for place in places:
        for name, value in WRONG.items():
            yield f"{'.'.join(place)} is {name}", lambda p=place, v=value: put(path, p, json.dumps(v))
        for name, text in RAW.items():
            yield f"{'.'.join(place)} is {name}", lambda p=place, t=text: put(path, p, t)
        yield f"no {'.'.join(place)}", lambda p=place: put(path, p, None)


def put(path: Path, place: tuple[str, ...], text: str | None) -> None:
    """Write a JSON text in place of one value; None: delete the key."""
    before, line, after = b"", path.read_bytes(), b""
    if path.suffix == ".jsonl":
        first, line, *others = line.splitlines(keepends=True)
        before, after = first, b"".join(others)
    whole = json.loads(line)
    at = whole
    for key in place[:-1]:
        at = at[key]
    if text is None:
        del at[place[-1]]
    else:
        at[place[-1]] = "@@"
    changed = json.dumps(whole).replace('"@@"', text or "") + "\n"
    path.write_bytes(before + changed.encode() + after)
