"""Damage to a checkpoint: each file deleted, cut, emptied, with one bit flipped at several places, or of another step."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.reliability.campaign import STEPS, Campaign, spread

NEWEST, OLDER = STEPS - 2, STEPS - 4
PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(place: float, file: Path) -> None:
    """Flip the lowest bit of a byte: 0 is the first, 1 the last."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def swap(file: Path) -> None:
    """Put the older checkpoint's file in its place."""
    newest = next(parent for parent in file.parents if parent.name == f"checkpoint-{NEWEST}")
    shutil.copy(newest.with_name(f"checkpoint-{OLDER}") / file.relative_to(newest), file)


def damages(checkpoint: Path) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Yield (file, name, damage) of every damage that changes a file of the checkpoint."""
    older = checkpoint.with_name(f"checkpoint-{OLDER}")
    ways: dict[str, Callable[[Path], None]] = {"deleted": Path.unlink, "cut": cut, "emptied": empty}
    ways["a byte longer"] = lengthened
    ways |= {f"a bit flipped at {place:.0%}": partial(flip, place) for place in PLACES}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = str(file.relative_to(checkpoint))
        yield from ((name, how, damage) for how, damage in ways.items())
        if (older / name).is_file() and (older / name).read_bytes() != file.read_bytes():
            yield name, "of another step", swap


def chosen(campaign: Campaign, count: int) -> list[tuple[str, str, Callable[[Path], None]]]:
    found = list(damages(campaign.untouched / f"checkpoints/checkpoint-{NEWEST}"))
    return [found[i] for i in spread(count, len(found))]


def damage_the_newest(campaign: Campaign, count: int) -> None:
    """Do `count` damages to the newest checkpoint: each is to be said before training, and fallen back from."""
    newest = f"checkpoint-{NEWEST}"

    def unsaid(text: str) -> str:
        before = text.partition(f"{OLDER + 1}/{STEPS} ")[0]
        return "" if newest in before and f"checkpoint-{OLDER}" in before else "the damage was not said before training"

    for name, how, damage in chosen(campaign, count):
        damage(campaign.rewind(NEWEST) / "checkpoints" / newest / name)
        campaign.resume(f"{name} {how}", check=unsaid)


def damage_the_only_one(campaign: Campaign, count: int) -> None:
    """Do `count` damages to a run's only checkpoint: each is said in one line, and the run goes on from step 1."""

    def unsaid(text: str) -> str:
        lines = [line for line in text.partition(f"1/{STEPS} ")[0].splitlines() if f"checkpoint-{NEWEST}" in line]
        return "" if len(lines) == 1 and "step 1" in text else f"said of it: {lines}"

    for name, how, damage in chosen(campaign, count):
        run_dir = campaign.rewind(NEWEST)
        damage(run_dir / f"checkpoints/checkpoint-{NEWEST}" / name)
        shutil.rmtree(run_dir / f"checkpoints/checkpoint-{OLDER}")
        campaign.resume(f"{name} {how}, no other checkpoint", check=unsaid)


def files(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """Say which files a refused command has changed; a lock may stay."""
    names = {name for name in {*before, *after} if before.get(name) != after.get(name) and "lock" not in name}
    return f"changed: {', '.join(sorted(names))}" if names else ""
