"""A certificate as `verify` writes it, for tests of who reads it."""

from typing import Any

from rlinvariant.models.families import FAMILIES
from rlinvariant.verification import certificate


def a_certificate(**changes: Any) -> dict[str, Any]:
    about = certificate.subject(FAMILIES["llama"](), "bfloat16")
    model = {"name": "tiny-llama", "random_weights": True}
    whole = {
        "exact": True,
        "form": "full",
        "subject": about,
        "tokens": 5,
        "date": "2026-01-01T00:00:00Z",
        "model": model,
        "relations": [],
    }
    return whole | changes
