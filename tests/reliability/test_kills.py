"""kill -9 by the hundred."""

import pytest

from tests.reliability.campaign import Campaign, sampled
from tests.reliability.kills import kill_at_events, kill_at_times

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]


def test_a_run_killed_at_any_event_goes_on_bit_for_bit(lab, record_reliability):
    campaign = Campaign(lab)
    kill_at_events(campaign, sampled(100))
    old = campaign.control(("trust_every_checkpoint", {}))
    kill_at_events(old, sampled(12), among="checkpoint-4", in_place=True)
    record_reliability("kills", campaign.good, campaign.tried, f"written in place, read unverified: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert old.bad, "the control is blind"


def test_a_run_killed_at_any_time_goes_on_bit_for_bit(lab, record_reliability):
    campaign = Campaign(lab)
    kill_at_times(campaign, sampled(6))
    record_reliability("kills, timed", campaign.good, campaign.tried, "none of its own: see the row above")
    assert not campaign.bad, campaign.report
