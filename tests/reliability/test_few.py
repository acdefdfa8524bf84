"""A few of what `make reliability` does by the hundred, for `make test`: runs of a tiny model, a second or two each."""

import pytest

from tests.reliability.campaign import Campaign
from tests.reliability.damages import damage_the_newest
from tests.reliability.disks import fill_the_disk
from tests.reliability.kills import kill_at_events
from tests.reliability.offsets import SETTINGS, resume_everywhere
from tests.reliability.others import resume_what_is_finished


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(lab):
    campaign = Campaign(lab)
    kill_at_events(campaign, 2, among="checkpoint-4")
    assert not campaign.bad, campaign.report


def test_a_run_killed_at_its_start_goes_on_bit_for_bit(lab):
    campaign = Campaign(lab)
    kill_at_events(campaign, 1, among="config.json")
    assert not campaign.bad, campaign.report


def test_damage_is_fallen_back_from(lab):
    campaign = Campaign(lab)
    damage_the_newest(campaign, 2)
    assert not campaign.bad, campaign.report


def test_damage_that_is_not_looked_for_is_not_fallen_back_from(lab):
    """Control."""
    campaign = Campaign(lab).control(("trust_every_checkpoint", {}))
    damage_the_newest(campaign, 1)
    assert campaign.bad


def test_a_rollout_in_progress_goes_on_bit_for_bit(lab):
    name = "epochs of two steps, a rollout of two"
    campaign = resume_everywhere(lab, name, SETTINGS[name], steps=4, offsets=[1, 3])
    assert not campaign.bad, campaign.report


def test_a_rollout_that_is_not_saved_is_missed(lab):
    """Control."""
    name = "epochs of two steps, a rollout of two"
    planted = [("forget_the_rollout", {})]
    assert resume_everywhere(lab, name, SETTINGS[name], steps=4, offsets=[1], planted=planted).bad


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(lab):
    campaign = Campaign(lab)
    fill_the_disk(campaign, 1)
    assert not campaign.bad, campaign.report


def test_a_finished_run_is_only_evaluated(lab):
    campaign = Campaign(lab)
    resume_what_is_finished(campaign)
    assert not campaign.bad, campaign.report
