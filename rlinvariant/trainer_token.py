"""The token that a trainer shows to the servers it draws from: one line in a file that nobody but its owner may read."""

import hashlib
import hmac
import os
import re
import stat

from rlinvariant.errors import UserError

MAKE = "make one: (umask 077; openssl rand -hex 32 > FILE)"
LEAST = 32  # characters: 128 bits where they are hexadecimal


class Token:
    """Holds a token; whoever prints it gets stars, so that no log has it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    @property
    def header(self) -> dict[str, str]:
        """Return the header of a request that shows the token."""
        return {"Authorization": f"Bearer {self._text}"}

    def is_shown_by(self, authorization: str) -> bool:
        """Tell whether a request's Authorization header shows the token; the time says nothing about it."""
        kind, _, given = authorization.partition(" ")
        return same(given, self._text) and kind.lower() == "bearer"


def same(one: str, other: str) -> bool:
    """Compare two secrets in a time that says nothing about either, not even its length."""
    one_digest, other_digest = (hashlib.sha256(x.encode("utf-8", "surrogateescape")).digest() for x in (one, other))
    return hmac.compare_digest(one_digest, other_digest)


def read(path: str, key: str) -> Token:
    """Read the token in a file.

    Args:
        path: of the file.
        key: the setting that names it, as the user writes it before the path.

    Raises:
        UserError: the file cannot be read, others may read it, or it does not hold one line of 32 characters or more.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(4096).strip()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{key}{path}: cannot be read ({why}); {MAKE}") from error
    if not stat.S_ISFIFO(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{key}{path}: mode {mode & 0o777:o}: expected 600, that nobody else may read it; chmod 600 {path}")
    if not re.fullmatch(rf"[!-~]{{{LEAST},}}", text):
        raise UserError(f"{key}{path}: expected one line of {LEAST} characters or more, without spaces; {MAKE}")
    return Token(text)
