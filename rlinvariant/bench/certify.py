"""Verify every family of models/families.py with random weights, and keep the certificates: docs/results/parity.md.

Each run is `rlinvariant verify --random --tokens N`, all in one process. A refused family is a row too, with the reason.
Some of the families alone, by name, leave the rows of the others as they are.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlinvariant.bench.measure import Machine
from rlinvariant.errors import UserError
from rlinvariant.models.families import FAMILIES, REFUSED
from rlinvariant.report.console import Console
from rlinvariant.verification.verify import verify

TOKENS_PER_FAMILY = 20_000


def run(out: Path, tokens: int | None, tiny: bool, names: Sequence[str] = ()) -> int:
    """Write `out`/certificates/FAMILY.json, and `out`/families.json with what was refused. Returns 1 if one is not exact.

    A family that is refused keeps no certificate of an earlier time. `names`: of the families; all if empty.

    Raises:
        UserError: there is no family of such a name.
    """
    all_of_them = FAMILIES | REFUSED
    if unknown := [name for name in names if name not in all_of_them]:
        raise UserError(f"family {unknown[0]}: expected one of {', '.join(all_of_them)}")
    console, exact, written = Console(), True, out / "families.json"
    refused = json.loads(written.read_text())["refused"] if names and written.exists() else {}
    (out / "certificates").mkdir(parents=True, exist_ok=True)
    for family, config in all_of_them.items():
        if names and family not in names:
            continue
        refused.pop(family, None)
        with tempfile.TemporaryDirectory() as directory:
            config().save_pretrained(path := Path(directory) / family)
            amount: dict[str, Any] = {"short": True} if tiny else {"tokens": tokens or TOKENS_PER_FAMILY}
            certificate = out / "certificates" / f"{family}.json"
            try:
                found = verify(str(path), console=console, random=True, eager=True, **amount)
            except UserError as error:
                refused[family] = str(error).splitlines()[0].replace(f"model={path}: ", "").partition("; invariance=off")[0]
                console.print(f"{family}: refused: {refused[family]}")
                certificate.unlink(missing_ok=True)
            else:
                found["model"]["name"], exact = family, exact and found["exact"]
                certificate.write_text(json.dumps(found, indent=1, default=str) + "\n")
        Machine(tiny).write(written, {"refused": refused})
    return int(not exact)
