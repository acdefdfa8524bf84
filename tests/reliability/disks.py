"""A disk that becomes full at a write, and has space again."""

from pathlib import Path

from tests.reliability.campaign import Campaign, spread

DISK_FULL = 74


def fill_the_disk(campaign: Campaign, count: int) -> None:
    """Fill the disk at `count` points of a run: one line, exit 74; then resume with space, from what was whole before.

    Half of the points are spread over the bytes that a run writes, most of which are checkpoints; half over its writes, of
    which most are small.
    """
    campaign.clear()
    notes = campaign.lab.logs / f"bytes of {campaign.name}"
    under = {"under": str(campaign.run_dir)}
    run = campaign.start(faults=[("count_bytes", {**under, "notes": str(notes)})])
    assert run.wait() == 0, run.text[-3000:]
    spent, written = map(int, Path(notes).read_text().split())
    points = [{"free": at} for at in spread(count - count // 2, spent)] + [{"writes": at} for at in spread(count // 2, written)]
    for point in points:
        what = " ".join(f"{key}={value:,}" for key, value in point.items()) + f" of {spent:,} bytes, {written:,} writes"
        campaign.clear()
        run = campaign.start(faults=[("full_disk", {**under, **point}), *campaign.planted])
        code, lines = run.wait(), [line for line in run.text.splitlines() if line.startswith("error: ")]
        if code != DISK_FULL or len(lines) != 1 or "Traceback" in run.text:
            said = (lines or run.text.splitlines() or ["nothing"])[-1]
            campaign.note(what, f"exit {code}, {len(lines)} lines{', traceback' if 'Traceback' in run.text else ''}: {said}")
        else:
            campaign.resume(what)
