"""Directories that are checkpoints to go on from, and those that are not: every byte counts."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinvariant import checkpoints
from rlinvariant.checkpoints import DamagedCheckpoint
from rlinvariant.errors import UserError

FILES = {
    "model.safetensors": b"weights" * 100,
    "training/state.safetensors": b"moments" * 200,
    "config.json": b"{}",
    "empty": b"",
}


def save(run: Path, step: int) -> Path:
    """Write a checkpoint as the trainer does."""
    partial = run / checkpoints.PARTIAL / f"checkpoint-{step}"
    for name, content in FILES.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content + str(step).encode() * bool(content))
    checkpoints.finish(partial, run / f"checkpoint-{step}", step, {"settings": {"seed": 0, "x": (1.5, None)}})
    partial.parent.rmdir()
    return run / f"checkpoint-{step}"


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def damages(path: Path) -> list[tuple[str, Callable[[], object]]]:
    """Everything that can be done to one file: delete, empty, cut, lengthen, flip a bit anywhere."""
    found: list[tuple[str, Callable[[], object]]] = [("deleted", path.unlink)]
    if size := path.stat().st_size:
        found += [(f"cut at {n}", lambda n=n: path.write_bytes(path.read_bytes()[:n])) for n in (0, size // 2, size - 1)]
        found += [(f"bit {b}", lambda b=b: flipped(path, b)) for b in range(0, size * 8, max(1, size * 8 // 16) | 1)]
    found.append(("longer", lambda: path.write_bytes(path.read_bytes() + b"\n" * 1000 + b"x")))
    return found


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_damage_is_seen_and_the_checkpoint_before_is_taken(name, tmp_path):
    first = save(tmp_path, 2)
    last = save(tmp_path, 4)
    whole = tmp_path / "whole"
    shutil.copytree(last, whole)
    assert checkpoints.newest(tmp_path)[0] == checkpoints.verified(last)
    names = [what for what, _ in damages(last / name)]
    for number, what in enumerate(names):
        damages(last / name)[number][1]()
        found, said = checkpoints.newest(tmp_path)
        assert found is not None and found.path == first, f"{name} {what}: {said}"
        assert len(said) == 1 and str(last) in said[0] and "\n" not in said[0]
        shutil.rmtree(last)
        shutil.copytree(whole, last)
    assert len(names) >= (2 if name == "empty" else 15)


@pytest.mark.parametrize("name", ["empty", "manifest.json"])
def test_an_error_of_reading_is_no_damage(name, tmp_path):
    """The kernel answers EIO where a process reads its own memory at 0; the file has the size that the manifest says, 0."""
    save(tmp_path, 2)
    last = save(tmp_path, 4)
    (last / name).unlink()
    (last / name).symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"^\S+: cannot be read \(errno 5, .*nothing was changed.*move it away$") as error:
        checkpoints.newest(tmp_path)
    assert not isinstance(error.value, DamagedCheckpoint) and str(last) in str(error.value)
    (last / name).unlink()
    (last / name).mkdir()
    assert checkpoints.newest(tmp_path)[0] == checkpoints.verified(tmp_path / "checkpoint-2"), "control: that is damage"


def test_a_directory_that_may_not_be_read_is_not_an_empty_one(tmp_path):
    save(tmp_path, 2)
    root = os.geteuid() == 0  # who may read everything
    tmp_path.chmod(0)
    try:
        os.seteuid(65534) if root else None
        with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read \\(errno 13, Permission denied\\)"):
            checkpoints.newest(tmp_path)
    finally:
        os.seteuid(0) if root else None
        tmp_path.chmod(0o700)


def test_a_file_of_another_step_and_a_renamed_directory_are_seen(tmp_path):
    first, last = save(tmp_path, 2), save(tmp_path, 4)
    shutil.copy(first / "model.safetensors", last / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match="model.safetensors is damaged"):
        checkpoints.verified(last)
    first.rename(tmp_path / "checkpoint-8")
    with pytest.raises(DamagedCheckpoint, match="holds step 2: the directory was renamed"):
        checkpoints.verified(tmp_path / "checkpoint-8")


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{}", '{"sha256": 1}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\x00\xff"]
)
def test_a_manifest_that_is_none_is_one_line(text, tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="manifest.json is damaged"):
        checkpoints.verified(path)


def test_without_its_hashes_a_flipped_bit_would_pass(tmp_path, monkeypatch):
    """The control: sizes alone, as safetensors and zip readers look at them, see nothing."""
    path = save(tmp_path, 1)
    flipped(path / "model.safetensors", 77)
    recorded = json.loads((path / "manifest.json").read_text())["files"]
    monkeypatch.setattr(checkpoints, "_hashed", lambda *_: recorded)
    assert checkpoints.verified(path).step == 1


def test_what_the_writer_adds_comes_back_as_json_has_it(tmp_path):
    assert checkpoints.verified(save(tmp_path, 1)).about == {"settings": {"seed": 0, "x": [1.5, None]}}


def test_the_newest_are_kept_and_the_best(tmp_path):
    paths = {step: save(tmp_path, step) for step in (5, 10, 15, 100)}
    checkpoints.rotate(tmp_path, 2, 100, str(paths[5]))
    assert [step for step, _ in checkpoints.found(tmp_path)] == [100, 15, 5]
    checkpoints.rotate(tmp_path, None, 100)
    checkpoints.rotate(tmp_path, 1, 100)
    assert [step for step, _ in checkpoints.found(tmp_path)] == [100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100"]


@pytest.mark.parametrize("left", [[120], [120, 110], [130, 120, 110]])
def test_what_was_just_written_is_never_deleted_for_a_later_one_that_is_damaged(left, tmp_path):
    for step in (100, *left):
        save(tmp_path, step)
    for step in left:
        flipped(tmp_path / f"checkpoint-{step}/model.safetensors", 5)
    save(tmp_path, 105)
    checkpoints.rotate(tmp_path, 2, 105)
    assert [step for step, _ in checkpoints.found(tmp_path)] == [105, 100]
    found, said = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 105 and not said


def test_checkpoints_over_which_a_run_goes_back_are_set_aside(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    checkpoints.set_aside(tmp_path, 5)
    save(tmp_path, 10)
    checkpoints.set_aside(tmp_path, 5)
    assert [step for step, _ in checkpoints.found(tmp_path)] == [5]
    aside = sorted(path.name for path in tmp_path.iterdir())
    assert aside == ["aside-checkpoint-10", "aside-checkpoint-15", "checkpoint-5"]


def test_what_a_kill_leaves_is_no_checkpoint_and_is_deleted(tmp_path):
    save(tmp_path, 1)
    for name in (f"{checkpoints.PARTIAL}/checkpoint-2", f"{checkpoints.REMOVED}-checkpoint-0"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in checkpoints.found(tmp_path)] == [1]
    checkpoints.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-x"]
