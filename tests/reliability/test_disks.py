"""Full disks."""

import pytest

from tests.reliability.campaign import Campaign, sampled
from tests.reliability.disks import fill_the_disk

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]


def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(lab, record_reliability):
    campaign = Campaign(lab)
    fill_the_disk(campaign, sampled(20))
    old = campaign.control(("let_the_disks_error_pass", {}))
    fill_the_disk(old, sampled(4))
    record_reliability("full disks", campaign.good, campaign.tried, f"error not caught: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert not old.good, "the control is blind"
