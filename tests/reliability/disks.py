"""A disk that becomes full at a write, and has space again."""

from pathlib import Path

from tests.reliability.campaign import Campaign, spread

DISK_FULL = 74
FINE = 10_000  # points that the bytes of a run are divided into


def fill_the_disk(campaign: Campaign, count: int) -> None:
    """Let a run write a part of its bytes and no more; then resume it with space, from a checkpoint that was whole before."""
    campaign.clear()
    notes = campaign.lab.logs / f"bytes of {campaign.name}"
    under = {"under": str(campaign.run_dir)}
    run = campaign.start(faults=[("count_bytes", {**under, "notes": str(notes)})])
    assert run.wait() == 0, run.text[-3000:]
    whole = int(Path(notes).read_text())
    for index in spread(count, FINE):
        free = index * whole // FINE
        what = f"{free:,} of {whole:,} bytes free"
        campaign.clear()
        run = campaign.start(faults=[("full_disk", {**under, "free": free}), *campaign.planted])
        code, lines = run.wait(), [line for line in run.text.splitlines() if line.startswith("error: ")]
        if code != DISK_FULL or len(lines) != 1 or "Traceback" in run.text:
            campaign.note(what, f"exit {code}, {len(lines)} lines of error{', traceback' if 'Traceback' in run.text else ''}")
        else:
            campaign.resume(what)
