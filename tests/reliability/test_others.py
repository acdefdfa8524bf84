"""Resuming otherwise than as it was."""

import json

import pytest

from tests.reliability.campaign import SETTINGS, Campaign
from tests.reliability.others import (
    resume_otherwise,
    resume_twice_at_once,
    resume_what_is_finished,
    resume_with_other_rows,
)

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(3600)]


def test_another_setting_is_refused_or_said(lab, record_reliability, tmp_path):
    campaign = Campaign(lab)
    resume_otherwise(campaign)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(10, 42)))
    of_a_file = Campaign(lab, "rows", (*SETTINGS, f"data.path={rows}"))
    resume_with_other_rows(of_a_file, rows)
    old = campaign.control(("compare_no_setting", {}))
    resume_otherwise(old)
    good, tried = campaign.good + of_a_file.good, campaign.tried + of_a_file.tried
    record_reliability("other settings", good, tried, f"not compared: {old.good} / {old.tried}")
    assert not campaign.bad + of_a_file.bad, f"{campaign.report}\n{of_a_file.report}"
    assert old.bad, "the control is blind"


def test_one_of_two_resumes_at_once_goes_on(lab, record_reliability):
    campaign = Campaign(lab)
    resume_twice_at_once(campaign)
    old = campaign.control(("lock_nothing", {}))
    resume_twice_at_once(old)
    record_reliability("two at once", campaign.good, campaign.tried, f"no lock: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert old.bad, "the control is blind"


def test_a_finished_run_is_only_evaluated(lab, record_reliability):
    campaign = Campaign(lab)
    resume_what_is_finished(campaign)
    old = campaign.control(("train_on", {}))
    resume_what_is_finished(old)
    record_reliability("finished", campaign.good, campaign.tried, f"resumed as any other: {old.good} / {old.tried}")
    assert not campaign.bad, campaign.report
    assert old.bad, "the control is blind"
