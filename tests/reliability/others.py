"""Resuming otherwise than as it was: with other settings, twice at once, when all is done."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.campaign import STEPS, Campaign
from tests.reliability.damages import NEWEST, changed, files
from tests.reliability.rundirs import differences

REFUSED: dict[str, Sequence[str]] = {  # name -> settings; the last is the one that the line must name
    "another seed": ("seed=1",),
    "other data": ("data.train_size=24",),
    "another batch size": ("trainer.per_device_train_batch_size=8",),
    "another recipe": ("data.digits=3", "recipe=arithmetic"),
    "another dtype": ("dtype=float32",),
    "without invariance": ("invariance=off",),
    "another learning rate": ("trainer.learning_rate=0.1",),
    "several iterations": ("trainer.num_iterations=2",),
    "fewer steps than are done": (f"steps={NEWEST - 1}",),
    "more steps, which the learning rates depend on": (f"steps={STEPS + 2}",),
    "another algorithm": ("algorithm=ppo",),
}
SAID = {"more frequent checkpoints": "trainer.save_steps=1"}  # decides no bit


def resume_otherwise(campaign: Campaign) -> None:
    """Resume with each other setting: refused in one line that names it and changes nothing; or said, if it decides no bit."""
    for name, settings in REFUSED.items():
        before = files(campaign.rewind(NEWEST))
        run = campaign.start("resume=true", *settings, faults=campaign.planted)
        code, errors = run.wait(), [line for line in run.text.splitlines() if line.startswith("error: ")]
        key = settings[-1].partition("=")[0]
        if code != 2 or "Traceback" in run.text:
            wrong = f"exit {code}: {run.text.splitlines()[-1]}"
        elif not any(key in line for line in errors):
            wrong = f"no line names {key}: {errors}"
        else:
            wrong = changed(before, files(campaign.run_dir))
        campaign.note(name, wrong)
    for name, setting in SAID.items():
        campaign.rewind(NEWEST)
        key = setting.partition("=")[0]
        campaign.resume(name, setting, check=lambda text, key=key: "" if key in text else f"{key} was not said")


def resume_with_other_rows(campaign: Campaign, rows: Path) -> None:
    """Resume with the same settings, of which one names a file whose rows have changed: refused in one line."""
    campaign.rewind(NEWEST)
    rows.write_text("\n".join(reversed(rows.read_text().splitlines())) + "\n")
    run = campaign.start("resume=true", faults=campaign.planted)
    code, errors = run.wait(), [line for line in run.text.splitlines() if line.startswith("error: ")]
    good = code == 2 and len(errors) == 1 and "data" in errors[0]
    campaign.note("other rows of the same file", "" if good else f"exit {code}: {errors}")


def resume_twice_at_once(campaign: Campaign) -> None:
    """Start two resumes together: one goes on and ends as the untouched run; the other is refused in one line.

    Whichever has the lock holds it until the other has ended, however busy the machine is.
    """
    campaign.rewind(NEWEST)
    one_has_ended = campaign.lab.logs / f"{campaign.name}: {len(campaign.planted)} planted, one has ended"
    hold = ("hold_the_lock", {"until": str(one_has_ended)})
    runs = [campaign.start("resume=true", faults=[hold, *campaign.planted]) for _ in range(2)]
    while all(campaign.lab.wait(run.pid, 0.1) is None for run in runs):
        pass
    one_has_ended.touch()
    codes = sorted(run.wait() or 0 for run in runs)
    said = [line for run in runs for line in run.text.splitlines() if line.startswith("error: ")]
    finished = (campaign.run_dir / "result.json").exists()
    wrong = differences(campaign.run_dir, campaign.untouched) if finished else ["no result"]
    if codes != [0, 2] or len(said) != 1 or "at work" not in said[0]:
        wrong.append(f"exit {codes}: {said}")
    campaign.note("two resumes at once", "; ".join(wrong))


def resume_what_is_finished(campaign: Campaign) -> None:
    """Resume a finished run: it is evaluated, and nothing is trained."""
    campaign.clear()
    shutil.copytree(campaign.untouched, campaign.run_dir)
    campaign.resume("finished", check=lambda text: f"step {STEPS + 1} was trained" if f"{STEPS + 1}/{STEPS}" in text else "")
