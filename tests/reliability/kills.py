"""kill -9 at what a run does to its files, and at times."""

import random
import time

from tests.reliability.campaign import Campaign, spread


def events(campaign: Campaign) -> list[str]:
    """Return what an undisturbed run does to its files, in order; it is run once."""
    notes = campaign.lab.logs / f"events of {campaign.name}"
    if not notes.exists():
        campaign.clear()
        run = campaign.start(faults=[("note_events", {"under": str(campaign.run_dir), "notes": str(notes)})])
        assert run.wait() == 0, run.text[-3000:]
    return notes.read_text().splitlines()


def kill_at_events(campaign: Campaign, count: int, among: str = "", in_place: bool = False) -> None:
    """Kill at `count` events, spread over start, steps, saves and end; half of them with the last file torn.

    Args:
        campaign: says which run.
        count: how many kills.
        among: what the events are about: a part of a file's name.
        in_place: leave what a checkpoint has so far under its own name, as if it were written there: a control.
    """
    found = events(campaign)
    points = [(at, torn) for at in range(1, len(found) + 1) if among in found[at - 1] for torn in (False, True)]
    for index in spread(count, len(points)):
        at, torn = points[index]
        campaign.clear()
        where = {"under": str(campaign.run_dir), "event": at, "torn": torn, "in_place": in_place}
        code = campaign.start(faults=[("kill_at", where)]).wait()
        what = f"killed at event {at}, {found[at - 1]}{', torn' if torn else ''}"
        if code == -9:
            campaign.resume(what)
        else:
            campaign.note(what, f"not killed, exit {code}")


def kill_at_times(campaign: Campaign, count: int) -> None:
    """Kill after `count` times between a third of a whole run's time and all of it."""
    campaign.clear()
    began = time.monotonic()
    assert campaign.start().wait() == 0
    whole, generator = time.monotonic() - began, random.Random(8)
    for _ in range(count):
        campaign.clear()
        after_s = generator.uniform(0.3, 1) * whole
        run = campaign.start()
        time.sleep(after_s)
        run.kill()
        run.wait()
        campaign.resume(f"killed after {after_s:.2f} s")
