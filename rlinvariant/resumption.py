"""Find what a run goes on from, and refuse what would make another run of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlinvariant import checkpoints
from rlinvariant.checkpoints import Checkpoint
from rlinvariant.config import Config
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.kernels.choice import AUTO
from rlinvariant.report.rundir import RunDir, read_metrics
from rlinvariant.types import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset

FREE = ("steps", "save_minutes", "save_dtype", "completions_gib", "reward_timeout", "tool_timeout", "wandb.")
"""Settings, or their beginnings, that decide no bit of what is trained."""
FREE_OF_TRAINER = (
    "save_",
    "log",
    "report_to",
    "run_name",
    "disable_tqdm",
    "hub_",
    "push_to_hub",
    "project",
    "trackio",
    "num_completions",
) + ("dataloader_", "skip_memory_metrics", "include_", "ddp_timeout", "average_tokens")
SHAPES = ("lora.r", "lora.target_modules")
"""Settings by which a checkpoint's adapters have shapes that other settings cannot load."""
ADDED = {"attention": AUTO, "gradients": "stock", "lora.r": 0, "tools": [], "environment": None}
"""Settings that decide bits and that earlier versions did not have -> what those versions did."""
ROWS_HASHED = 1000  # rows of a data set that are read together


@dataclass(frozen=True)
class Resumption:
    """Says what a run goes on from.

    Args:
        checkpoint: the newest whole one; None: the run starts at step 1.
        lines: what the user should know.
        changed: settings that differ from the checkpoint's and hold all the same, by the user's wish.
    """

    checkpoint: Checkpoint | None = None
    lines: Sequence[str] = ()
    changed: Sequence[str] = ()

    @property
    def step(self) -> int:
        """Return how many optimizer steps are done."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def settings(config: Config) -> JsonObject:
    """Return every setting's value, as JSON gives it back, and the SHA-256 of the files of what the user names."""
    found = {key: entry["value"] for key, entry in config.resolved().items()}
    files = {f"file of {what} {name}, sha256": found.digest[:16] for what, name, found in config.named()}
    return json.loads(json.dumps(found | files))


def find(config: Config) -> Resumption:
    """Find what the run goes on from. Reads every byte of the newest checkpoint.

    Raises:
        ConfigErrors: the settings make another run of it, one line each; `resume=force` accepts them.
        UserError: the rows that a checkpoint builds on are damaged.
    """
    if not config.resume:
        return Resumption()
    directory = RunDir(config.run_dir)
    checkpoint, damages = checkpoints.newest(directory.checkpoints)
    before = _settings_before(directory, checkpoint)
    done = 0 if checkpoint is None else checkpoint.step
    if config.steps < done:
        raise UserError(f"steps={config.steps}: the run has done {done}; expected as many or more")
    changed, notes = _compared(config, before)
    if shapes := [line for line in changed if line.startswith(SHAPES) and checkpoint is not None]:
        raise ConfigErrors(
            [f"{line}, which its adapters are made for; resume with that, or start a new run" for line in shapes]
        )
    if changed and config.resume != "force":
        raise ConfigErrors([f"{line}; resume with that, or write resume=force" for line in changed])
    lines = [f"skipped, as it is not whole: {damage}" for damage in damages]
    if checkpoint is None:
        lines.append(f"no checkpoint in {directory.checkpoints}: from step 1")
    else:
        lines.append(f"resuming from {checkpoint.path.name}")
        lines += _missing_rows(directory, checkpoint)
        checkpoint = replace(checkpoint, forced=bool(changed))
    lines += [f"by resume=force: {line}" for line in changed] + notes
    return Resumption(checkpoint, lines, changed)


def require_same_data(resumption: Resumption, digest: str, config: Config) -> Resumption:
    """Refuse rows other than those that the run has been trained on; `resume=force` takes them.

    Raises:
        UserError: as it says.
    """
    before = None if resumption.checkpoint is None else resumption.checkpoint.about.get("data")
    if before in (None, digest):
        return resumption
    line = f"training data: other rows (sha256 {digest[:12]}...) than the run was trained on ({before[:12]}...)"
    if config.resume != "force":
        raise UserError(f"{line}; resume with the same, or write resume=force")
    return replace(resumption, changed=[*resumption.changed, line], lines=[*resumption.lines, f"by resume=force: {line}"])


def dataset_digest(dataset: "Dataset") -> str:
    """Return the SHA-256 of a data set's rows, in order, as hex."""
    digest = hashlib.sha256()
    for at in range(0, len(dataset), ROWS_HASHED):
        digest.update(repr(dataset[at : at + ROWS_HASHED]).encode(errors="backslashreplace"))
    return digest.hexdigest()


def _settings_before(directory: RunDir, checkpoint: Checkpoint | None) -> Mapping[str, Any]:
    """Return the settings that the run had; nothing where it left none, as one that was killed at its start."""
    if checkpoint is not None:
        return checkpoint.about["settings"]
    if not directory.config.exists():
        return {}
    entries = directory.read_config().items()
    return {key: entry["value"] for key, entry in entries if isinstance(entry, dict) and "value" in entry}


def _compared(config: Config, before: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return a line for each setting that makes another run than the one before, and for each other that differs."""
    changed, notes, before = [], [], {**ADDED, **before} if before else before
    for key, value in settings(config).items():
        if key in ("run", "resume") or key not in before or before[key] == value:
            continue
        line = f"{key}={value}: the run was started with {before[key]}"
        schedule = getattr(config.trainer.lr_scheduler_type, "value", config.trainer.lr_scheduler_type)
        if key == "steps" and schedule != "constant":
            changed.append(f"{line}, and lr_scheduler_type={schedule} sets every step's learning rate by it")
        elif _is_free(key, config.invariance):
            notes.append(f"note: {line}")
        else:
            changed.append(line)
    return changed, notes


def _is_free(key: str, invariance: str) -> bool:
    """Say whether a setting decides no bit of what is trained."""
    if key.startswith("sampler."):
        return invariance == "exact"  # there the sampler's bits do not depend on how it is run
    if key.startswith("trainer."):
        return key.removeprefix("trainer.").startswith(FREE_OF_TRAINER)
    return key.startswith(FREE)


def _missing_rows(directory: RunDir, checkpoint: Checkpoint) -> list[str]:
    """Say which rows of metrics.jsonl that the checkpoint builds on are not there. UserError where one is damaged."""
    size = checkpoint.about["logs"].get(directory.metrics.name, 0)
    rows = {row["step"] for row in read_metrics(directory.metrics, size)} if directory.metrics.exists() else set()
    missing = [step for step in range(1, checkpoint.step + 1) if step not in rows]
    if not missing:
        return []
    return [f"note: {directory.metrics} has no row of {len(missing)} of the first {checkpoint.step} steps, {missing[0]} first"]
