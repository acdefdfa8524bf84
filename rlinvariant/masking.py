"""Secrets in settings, told by the name of the setting or by the form of an address: no file of a run has one."""

import re
from collections.abc import Sequence

from rlinvariant.types import Json

MASK = "***"
_NAMES = re.compile(r"(token|secret|password|passwd|credentials?|(api|access|secret|private|auth)_?key)$", re.IGNORECASE)
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://USER:PASSWORD@host


def masked(key: str, value: Json) -> Json:
    """Return a setting's value as a file may have it: MASK for a secret, and for the user and password of an address."""
    if _NAMES.search(key) and value not in (None, ""):
        return MASK
    return _USER_OF_ADDRESS.sub(MASK, value) if isinstance(value, str) else value


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line's arguments, `key=value` and others, as a file may have them."""
    pairs = (argument.partition("=") for argument in arguments)
    return [f"{key}{equals}{masked(key, value)}" if equals else masked("", key) for key, equals, value in pairs]
