"""Resuming after every step."""

import pytest

from tests.reliability.offsets import PPO, SETTINGS, STALE, resume_everywhere

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]
ROLLOUT, EPOCH = ("forget_the_rollout", {}), ("forget_the_epoch", {})


def test_a_run_goes_on_from_any_step(lab, record_reliability):
    campaigns = [resume_everywhere(lab, name, settings) for name, settings in SETTINGS.items()]
    reused, epochs = "steps_per_generation=4", "epochs of two steps"
    rollout = resume_everywhere(lab, reused, SETTINGS[reused], planted=(ROLLOUT,))
    epoch = resume_everywhere(lab, epochs, SETTINGS[epochs], planted=(EPOCH,))
    control = f"no rollout saved: {rollout.good} / {rollout.tried}; first epoch's order: {epoch.good} / {epoch.tried}"
    record_reliability("offsets", sum(c.good for c in campaigns), sum(c.tried for c in campaigns), control)
    assert not any(c.bad for c in campaigns), "\n".join(c.report for c in campaigns)
    assert rollout.bad and epoch.bad, "a control is blind"


@pytest.mark.parametrize(("name", "settings"), [("offsets, PPO", PPO), ("offsets, staleness", STALE)])
def test_so_does_another_kind_of_run(name, settings, lab, record_reliability):
    settings = (*settings, *SETTINGS["epochs of two steps, a rollout of two"])
    campaign = resume_everywhere(lab, name, settings, steps=5)
    spoilt = resume_everywhere(lab, name, settings, steps=5, planted=(ROLLOUT, EPOCH))
    control = f"no rollout saved, first epoch's order: {spoilt.good} / {spoilt.tried}"
    record_reliability(name, campaign.good, campaign.tried, control)
    assert not campaign.bad, campaign.report
    assert spoilt.bad, "the control is blind"
