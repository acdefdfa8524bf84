"""W&B as a view of metrics.jsonl: the same keys, offline without a login, absent without the package."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlinvariant import reading
from rlinvariant.errors import UserError, one_line
from rlinvariant.install import install_hint
from rlinvariant.text import printable, shown
from rlinvariant.types import JsonRow, Untyped

TABLE, TABLE_ROWS, TABLE_CHARACTERS = "completions", 16, 2000
"""The key of a step's table of completions, how many rows it has at most, and how much of each text."""
Log = Callable[[Mapping[str, Any], int], None]


def start(
    settings: Any, run_dir: Path, config: JsonRow, run_id: str | None = None, files: Sequence[Path] = ()
) -> tuple[str, Log | None, Callable[[], None]]:
    """Open a W&B run for `settings` (`wandb.*` of the configuration).

    A run in a directory of its own arm, runs/ablation-NAME/ARM/seed-N, has ARM as job type, by which W&B groups.

    Args:
        run_id: online, of a run at W&B, to which steps that it does not have are added, or of a new one; offline, to be sent
            under.
        files: that `finish` adds as an artifact, as far as they are there: report and certificates.

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
        raise UserError(f"wandb.mode={mode}: wandb is not installed; {install_hint('dashboard')}, or wandb.mode=disabled")
    has_login = mode != "offline" and login(f"wandb.mode={mode}", "wandb.mode=offline")
    if mode == "online" and not has_login:
        raise UserError("wandb.mode=online: no login found; run `wandb login`, or wandb.mode=offline")
    mode, name = "online" if has_login else "offline", Path(str(config["run"]["value"]))
    _silence()
    import wandb
    from wandb.errors import Error

    try:
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=name.parent.name or None,
            tags=list(settings.tags) or None,
            name=str(name),
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,
            dir=str(run_dir),
            mode=mode,
            config={key: entry["value"] for key, entry in config.items()},
            # Its metadata has the command line as it was typed, and the remote of git, both perhaps with a secret in them
            settings=wandb.Settings(silent=True, x_disable_meta=True, disable_git=True),
        )
    except Error as error:
        raise UserError(
            f"wandb.project={shown(settings.project, 40)}: W&B: {one_line(error, 120)}; wandb.mode=disabled"
        ) from error

    def finish() -> None:
        if there := [file for file in files if file.is_file()]:
            artifact = wandb.Artifact(f"report-{run.id}", type="report")
            for file in there:
                artifact.add_file(str(file))
            run.log_artifact(artifact)
        run.finish()

    return mode, lambda row, step: run.log({key: x for key, x in row.items() if key != "kind"}, step=step), finish


def table(rows: Sequence[JsonRow]) -> Untyped:
    """Return a W&B table of at most TABLE_ROWS completions of a step, from the best to the worst, evenly; W&B must be there."""
    import wandb

    has = lambda row: isinstance(row.get("reward"), int | float)  # noqa: E731  of samples.jsonl, perhaps not
    ranked = sorted(rows, key=lambda row: (not has(row), -row["reward"] if has(row) else 0.0))
    count = min(len(ranked), TABLE_ROWS)
    chosen = [ranked[i * (len(ranked) - 1) // max(1, count - 1)] for i in range(count)]
    texts, numbers = ("prompt", "completion"), ("reward", "advantage", "length", "truncated", "mismatched_tokens")
    names = list(dict.fromkeys(name for row in chosen for name in row.get("rewards") or {}))
    columns: list[Any] = ["step", "prompt_id", "sample_id", *texts, *numbers, *(f"rewards/{name}" for name in names)]
    data: list[Any] = [
        [
            *(row.get(key) for key in columns[:3]),
            *(printable(str(row.get(key))[:TABLE_CHARACTERS], keep="\n") for key in texts),
            *(row.get(key) for key in numbers),
            *((row.get("rewards") or {}).get(name) for name in names),
        ]
        for row in chosen
    ]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def recorded_id(run_dir: Path) -> str | None:
    """Return the W&B id that a run's environment.json has, or None."""
    try:
        found = reading.read(run_dir / "environment.json").get("wandb_id")
    except UserError:
        return None
    return found if isinstance(found, str) else None


def id_of(run_dir: Path) -> str:
    """Return the W&B id of a run: W&B's own setting, or the id under which the run has logged itself before, or a new one."""
    known = os.environ.get("WANDB_RUN_ID") or recorded_id(run_dir)
    return known or (live_ids(run_dir) or [secrets.token_hex(4)])[-1]


def live_ids(run_dir: Path) -> list[str]:
    """Return the W&B ids under which a run has logged itself, online or offline, oldest first, by W&B's own files."""
    found = [file.name.removeprefix("offline-") for file in (run_dir / "wandb").glob("*run-*-*") if file.is_dir()]
    return list(dict.fromkeys(name.split("-", 2)[2] for name in sorted(found)))  # run-TIME-ID


def _silence() -> None:
    """Have W&B print nothing: our console says where a run is. The setting of a run does not reach what W&B says of itself."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if "weave" not in sys.modules:  # W&B advertises it, even where W&B was set up before it was told to be silent
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")


def login(what: str, fix: str) -> bool:
    """Tell whether there is a login for W&B, which must be installed.

    Raises:
        UserError: there is one that does not work; `what` was to be done, `fix` is the way out.
    """
    _silence()
    import wandb
    from wandb.errors import Error

    try:
        return bool(wandb.login(prompt=False))
    except Error as error:
        reason = one_line(error)
        raise UserError(f"{what}: there is a W&B login, but it does not work ({reason}); {fix}") from error
