"""The documented commands: a run by them is a fork's run, killed and resumed; and two processes at once."""

import pytest

from tests.parity.device import cpu_only
from tests.reliability.campaign import SETTINGS, Campaign
from tests.reliability.launched import TIMEOUT_S, kill_after_rows, start, train
from tests.reliability.rundirs import differences

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]
REUSED = ("trainer.per_device_train_batch_size=8", "trainer.steps_per_generation=4", "trainer.gradient_accumulation_steps=2")


def test_a_real_run_is_a_forks_run_and_goes_on_when_killed(lab, record_reliability):
    """Also through `rlinvariant resume`, twice."""
    campaign = Campaign(lab)
    campaign.clear()
    whole = train(lab, campaign.name, SETTINGS, "cpu")
    campaign.note("exit code", "" if whole.wait(TIMEOUT_S) == 0 else f"{whole.returncode}")
    campaign.note("a real run against a fork's", "; ".join(differences(campaign.run_dir, campaign.untouched)))
    campaign.clear()
    kill_after_rows(train(lab, campaign.name, SETTINGS, "cpu"), campaign.run_dir, 3)
    kill_after_rows(start(lab, "resume", f"runs/{campaign.name}"), campaign.run_dir, 5)
    last = start(lab, "resume", campaign.name)
    ended = "" if last.wait(TIMEOUT_S) == 0 else f"exit {last.returncode}"
    campaign.note("killed twice, resumed twice", ended or "; ".join(differences(campaign.run_dir, campaign.untouched)))
    other = train(lab, "another_seed", (*SETTINGS, "seed=1"), "cpu")
    assert other.wait(TIMEOUT_S) == 0
    differing = differences(lab.runs / "another_seed", campaign.untouched)
    said = f"another seed: {len(differing)} of 5 parts differ"
    record_reliability("kills, of a real start", campaign.good, campaign.tried, said)
    assert not campaign.bad, campaign.report
    assert differing, "the control is blind"


@cpu_only("two processes of one run take a GPU each; here they are joined by gloo (configs/cpu2.yaml)")
def test_two_processes_go_on_inside_a_rollout_and_an_epoch(lab, record_reliability):
    settings = (*SETTINGS, *REUSED, "data.train_size=16", "trainer.save_steps=1")
    for name in ("two", "two_killed"):
        process = train(lab, name, settings, "cpu2")
        if name == "two":
            assert process.wait(TIMEOUT_S) == 0
        else:
            kill_after_rows(process, lab.runs / name, 3)
    resumed = start(lab, "resume", "two_killed")
    code = resumed.wait(TIMEOUT_S)
    wrong = [f"exit {code}"] if code else differences(lab.runs / "two_killed", lab.runs / "two")
    again = train(lab, "two_killed", (*settings, "resume=true"), "cpu")
    refused = again.wait(TIMEOUT_S) != 0
    record_reliability("offsets, two processes", int(not wrong), 1, f"by one process: {'refused' if refused else 'goes on'}")
    assert not wrong and refused
