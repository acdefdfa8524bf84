"""Damaged checkpoints by the hundred."""

import pytest

from tests.reliability.campaign import Campaign, sampled
from tests.reliability.damages import damage_the_newest, damage_the_only_one

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]
TRUST = ("trust_every_checkpoint", {})


def test_damage_is_said_and_fallen_back_from(lab, record_reliability):
    campaign = Campaign(lab)
    damage_the_newest(campaign, sampled(100))
    old = campaign.control(TRUST)
    damage_the_newest(old, sampled(10))
    record_reliability("damages", campaign.good, campaign.tried, f"read unverified: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert not old.good, "the control is blind"


def test_damage_to_the_only_checkpoint_is_said(lab, record_reliability):
    campaign = Campaign(lab)
    damage_the_only_one(campaign, sampled(10))
    old = campaign.control(TRUST)
    damage_the_only_one(old, sampled(5))
    record_reliability("damages, one checkpoint", campaign.good, campaign.tried, f"read unverified: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert not old.good, "the control is blind"
