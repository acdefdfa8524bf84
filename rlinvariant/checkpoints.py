"""Checkpoints that are whole or absent: written beside, hashed, renamed into place, and read only if every byte is as written.

A checkpoint is a directory `checkpoint-K`, K optimizer steps, with what the trainer saves and a `manifest.json`:

    schema     1
    step       K
    files      each other file: its bytes and its SHA-256
    about      what its writer adds: settings, sizes of logs, ...
    sha256     of the manifest without this entry

A process that dies at any point leaves checkpoints that were whole before, and perhaps a hidden directory, which the next save
removes. Nothing here imports torch.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.files import sync_directory, write_atomically
from rlinvariant.types import JsonRow

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL, REMOVED = ".partial", ".removed"
"""The beginnings of hidden directories' names: of a checkpoint that is being written, and of one that is being deleted."""
ASIDE = "aside"  # how the names begin of checkpoints over which a run went back
FREE_SPACE = "free space, then resume: checkpoints that were whole are still"
"""The advice to a user whose disk cannot hold a checkpoint."""
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""The errors of a path at which the file is not: damage. Any other error says nothing of what the disk holds."""
READERS = 4  # threads that hash files: hashing and reading release the interpreter


class DamagedCheckpoint(UserError):
    """Says in one line why a directory is no checkpoint to go on from."""


@dataclass(frozen=True)
class Checkpoint:
    """Describes a checkpoint whose every file had the recorded bytes when it was found.

    Args:
        path: its directory.
        step: optimizer steps that its weights have had.
        about: what its writer added to the manifest.
        forced: settings that differ from the checkpoint's are the user's wish, and hold instead of the saved ones.
    """

    path: Path
    step: int
    about: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False

    def require_layout(self, processes: int, sharded: bool) -> None:
        """Refuse a run of other processes than those that wrote this, each of which has a file of its own in it.

        Args:
            processes: how many there are now; all of them call this.
            sharded: whether each has a shard of every weight.

        Raises:
            UserError: they were others.
        """
        if (written := self.about["processes"]) != processes:
            why = f"written by {written} processes, this run has {processes}; resume with num_processes: {written}"
            raise UserError(f"{self.path}: {why}", agreed=True)
        if (cut := bool(self.about.get("sharded"))) != sharded:  # earlier versions had no shards
            each = {True: "a shard of every weight", False: "every weight whole"}
            fix = {True: "in shards, as 2gpu_fsdp2 (distributed_type: FSDP)", False: "without shards, as 2gpu"}
            why = f"written by processes that each had {each[cut]}; resume with a machine file {fix[cut]}"
            raise UserError(f"{self.path}: {why}", agreed=True)


def found(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of each directory that is named like a checkpoint, the newest first."""
    try:
        paths = list(directory.iterdir())  # not glob, to which a directory that cannot be read is an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in paths)
    return sorted(((int(name[1]), path) for name, path in names if name and path.is_dir()), reverse=True)


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, if there is one, and for each newer one a line that says what is wrong.

    Raises:
        UserError: one cannot be read now, so that nobody knows whether it is whole.
    """
    damages = []
    with _readable(directory):
        paths = [path for _, path in found(directory)]
    for path in paths:
        try:
            return verified(path), damages
        except DamagedCheckpoint as damage:
            damages.append(str(damage))
    return None, damages


def verified(path: Path) -> Checkpoint:
    """Read every file of a checkpoint, and return it if all have the recorded bytes.

    Raises:
        DamagedCheckpoint: a file is missing, cut or changed, or the directory was not written by `finish`.
        UserError: a file cannot be read now.
    """
    with _readable(path):
        manifest = _manifest(path)
        for name, recorded in manifest["files"].items():
            if not (path / name).is_file():
                raise DamagedCheckpoint(f"{path}: {name} is missing")
            if (size := (path / name).stat().st_size) != recorded["bytes"]:
                raise DamagedCheckpoint(f"{path}: {name} has {size:,} of {recorded['bytes']:,} bytes")
        hashed = _hashed(path, manifest["files"])
    for name, recorded in manifest["files"].items():
        if hashed[name] != recorded:
            raise DamagedCheckpoint(f"{path}: {name} is damaged: its bytes are not those that were written")
    return Checkpoint(path, manifest["step"], manifest["about"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of reading into one line: damage where a file is not there, else what may pass or be mended."""
    try:
        yield
    except NOT_THERE as error:
        raise DamagedCheckpoint(f"{path}: {one_line(error)}") from error
    except OSError as error:
        said = f"{error.filename or path}: cannot be read (errno {error.errno}, {error.strerror})"
        fix = f"mend that and resume again; to go on without {path.name}, move it away"
        raise UserError(f"{said}; whether the checkpoint is whole is not known, and nothing was changed; {fix}") from error


def _manifest(path: Path) -> dict[str, Any]:
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        why = "it was not written to its end, or by an older version"
        raise DamagedCheckpoint(f"{path}: no {MANIFEST}: {why}") from None
    try:
        manifest = json.loads(text)
        whole = manifest.pop("sha256") == _digest(manifest)
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is damaged") from error
    if not whole:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is damaged")
    if manifest["schema"] != SCHEMA:
        raise DamagedCheckpoint(f"{path}: schema {manifest['schema']}, expected {SCHEMA}: written by another version")
    if path.name != f"checkpoint-{manifest['step']}":
        raise DamagedCheckpoint(f"{path}: holds step {manifest['step']}: the directory was renamed")
    return manifest


def finish(partial: Path, path: Path, step: int, about: JsonRow) -> None:
    """Hash the files of `partial`, flush them to the disk, write their manifest, and rename the directory to `path`.

    What stood at `path` is deleted: a damaged checkpoint, over which a run went back.
    """
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    manifest = {"schema": SCHEMA, "step": step, "files": _hashed(partial, names, flush=True), "about": about}
    manifest = json.loads(json.dumps(manifest))  # as a reader will find it: no tuples, no numbers as keys
    for directory in {(partial / name).parent for name in names}:
        sync_directory(directory)
    write_atomically(partial / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
    remove(path)
    os.rename(partial, path)
    sync_directory(path.parent)


def rotate(directory: Path, keep: int | None, written: int, best: str | None = None) -> None:
    """Delete the oldest checkpoints of a run, so that `keep` are left, or all with None, and beside them `best`, a path.

    Args:
        written: the step whose checkpoint was written last. Those of later steps, which an earlier run has left, go first.
    """
    if keep is None:
        return
    spared = None if best is None else os.path.realpath(best)
    others = [(step, path) for step, path in found(directory) if os.path.realpath(path) != spared]
    others.sort(key=lambda other: other[0] > written)  # stable: each part stays with its newest first
    for _, path in others[keep:]:
        remove(path)


def set_aside(directory: Path, after: int) -> None:
    """Rename the checkpoints of the steps after one, over which a run goes again: they are no checkpoints, and not lost."""
    for step, path in found(directory):
        if step > after:
            aside = path.with_name(f"{ASIDE}-{path.name}")
            remove(aside)
            os.rename(path, aside)


def remove(path: Path) -> None:
    """Delete a directory, if it is there, so that no part of it is ever taken for a checkpoint."""
    if path.is_dir():
        away = path.with_name(f"{REMOVED}-{path.name}")
        shutil.rmtree(away, ignore_errors=True)
        os.rename(path, away)
        shutil.rmtree(away)


def clean(directory: Path) -> None:
    """Delete what killed processes have left half-written or half-deleted."""
    for path in (*directory.glob(f"{PARTIAL}*"), *directory.glob(f"{REMOVED}*")):
        shutil.rmtree(path, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hashed(directory: Path, names: Sequence[str] | Mapping[str, Any], flush: bool = False) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of files; with `flush`, each is on the disk when this returns."""

    def one(name: str) -> dict[str, Any]:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
            return {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(READERS, "checkpoint") as readers:
        return dict(zip(names, readers.map(one, names), strict=True))
