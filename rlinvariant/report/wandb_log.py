"""W&B as a view of metrics.jsonl: the same keys, offline without a login, absent without the package."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError

Log = Callable[[Mapping[str, Any], int], None]


def start(settings: Any, run_dir: Path, config: Mapping[str, Any]) -> tuple[str, Log | None, Callable[[], None]]:
    """Open a W&B run for `settings` (`wandb.*` of the configuration).

    Returns:
        (mode, log(row, step) or None, finish()). Mode "auto" becomes online with a login, offline without, and disabled
        where wandb is not installed.

    Raises:
        UserError: wandb was asked for by name and is not installed, or there is no login for online.
    """
    mode, installed = settings.mode, importlib.util.find_spec("wandb") is not None
    if mode == "disabled" or (mode == "auto" and not installed):
        return "disabled", None, lambda: None
    if not installed:
        raise UserError(f"wandb.mode={mode}: wandb is not installed; pip install wandb, or wandb.mode=disabled")
    os.environ.setdefault("WANDB_SILENT", "true")  # our console says where the run is
    import wandb

    has_login = mode != "offline" and bool(wandb.login(prompt=False))
    if mode == "online" and not has_login:
        raise UserError("wandb.mode=online: no login found; run `wandb login`, or wandb.mode=offline")
    mode = "online" if has_login else "offline"
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=list(settings.tags) or None,
        name=config["run"]["value"],
        dir=str(run_dir),
        mode=mode,
        config={key: entry["value"] for key, entry in config.items()},
        settings=wandb.Settings(silent=True),
    )
    return mode, lambda row, step: run.log(dict(row), step=step), run.finish
