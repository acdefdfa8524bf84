"""Every panel has something to draw: training emits its keys."""

import math

from rlinvariant.metrics import KEYS as TRAINING_KEYS
from rlinvariant.report.panels import CORRECTION, PANELS
from tests.parity.harness import train


def test_every_panel_reads_keys_that_training_emits(arithmetic_dir, exact_engine, tmp_path):
    """Those of all arms are ours; TRL's own are in the rows of a run that corrects, and in no other."""
    plain, corrected = (
        train(arithmetic_dir, exact_engine, tmp_path / str(on), max_steps=1, vllm_importance_sampling_correction=on).rows[0]
        for on in (False, True)
    )
    for panel in PANELS:
        assert set(panel.keys) <= corrected.keys(), panel.title
        if panel.arms == "all":
            assert set(panel.keys) <= set(TRAINING_KEYS) and set(panel.keys) <= plain.keys(), panel.title
            assert math.isfinite(panel.values([plain])[0]), panel.title
        else:
            assert not set(panel.keys) <= plain.keys(), panel.title
            assert math.isfinite(panel.values([corrected])[0]), panel.title


def test_panels_are_distinct_and_say_what_to_notice():
    assert len({panel.title for panel in PANELS}) == len({panel.keys for panel in PANELS}) == len(PANELS)
    assert all(panel.title and panel.unit and panel.notice.endswith((".", "?")) for panel in PANELS)


def test_values_of_a_panel_with_two_keys_are_a_quotient():
    panel = next(panel for panel in PANELS if len(panel.keys) == 2)
    rows = [dict(zip(panel.keys, pair, strict=True)) for pair in ((1, 4), (0, 4), (0, 0), (None, 4))] + [{}]
    found = panel.values(rows).tolist()
    assert found[:2] == [0.25, 0] and all(map(math.isnan, found[2:]))


def test_a_corrected_arm_is_known_by_its_configuration():
    panel = next(panel for panel in PANELS if panel.arms == "corrected")
    assert panel.shown_for({CORRECTION: {"value": True}})
    assert not panel.shown_for({CORRECTION: {"value": False}}) and not panel.shown_for({})
