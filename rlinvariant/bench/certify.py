"""Verify every family of `families.py` with random weights, and keep the certificates: the README's matrix of what runs.

Each is `rlinvariant verify --random --tokens N`, in one process. What is refused is a row too, with the reason.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from rlinvariant.bench.families import FAMILIES, REFUSED
from rlinvariant.bench.measure import Machine
from rlinvariant.errors import UserError
from rlinvariant.report.console import Console
from rlinvariant.verify.command import verify

TOKENS = 20_000


def run(out: Path, tokens: int | None, tiny: bool) -> int:
    """Write `out`/families.json and `out`/certificates/FAMILY.json. Returns 1 if one that should be exact is not, else 0."""
    console, rows = Console(), []
    (out / "certificates").mkdir(parents=True, exist_ok=True)
    for family, config in (FAMILIES | REFUSED).items():
        with tempfile.TemporaryDirectory() as directory:
            rows.append(_row(family, config(), Path(directory), tokens or TOKENS, tiny, out, console))
        Machine(tiny).write(out / "families.json", {"rows": rows})
    return int(any(row.get("exact") is False for row in rows))


def _row(family: str, config: Any, scratch: Path, tokens: int, tiny: bool, out: Path, console: Console) -> dict[str, Any]:
    """A row of the matrix: the family, and its certificate's numbers, or the reason why it is refused."""
    if torch.cuda.is_available() and getattr(config, "head_dim", None) == 32:
        config.head_dim = 64  # the least that FlashAttention-3 gives equal bits for
    config.save_pretrained(scratch / family)
    amount: dict[str, Any] = {"short": True} if tiny else {"tokens": tokens}
    try:
        found = verify(
            str(scratch / family), scratch=str(scratch / "weights"), console=console, random=True, eager=True, **amount
        )
    except UserError as error:
        reason = str(error).splitlines()[0].replace(f"model={scratch / family}: ", "").partition("; invariance=off")[0]
        console.print(f"{family}: refused: {reason}")
        return {"family": family, "refused": reason}
    found["model"]["name"] = family
    (out / "certificates" / f"{family}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    return {
        "family": family,
        "class": found["model"]["class"],
        "exact": found["exact"],
        "tokens": found["tokens"],
        "mismatched": found["mismatched"],
        "relations": len(found["relations"]),
        "controls": [sum(not c["blind"] for c in found["controls"]), len(found["controls"])],
        "longest": found["sizes"]["longest"],
    }
