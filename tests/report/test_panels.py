"""Every panel has something to draw: training emits its keys."""

import math

from rlinvariant.config import PPOConfig
from rlinvariant.keys import KEYS as TRAINING_KEYS
from rlinvariant.report.panels import ALGORITHM, CORRECTION, PANELS
from tests.parity.harness import train


def test_every_panel_reads_keys_that_training_emits(arithmetic_dir, exact_engine, tmp_path):
    """Keys of all arms are ours; TRL's own are in the rows of a run that corrects, the critic's in PPO's, and in no others."""
    kinds = {"all": {}, "corrected": {"vllm_importance_sampling_correction": True}, "ppo": {"ppo": PPOConfig()}}
    rows = {
        kind: train(arithmetic_dir, exact_engine, tmp_path / kind, max_steps=1, **changes).rows[0]
        for kind, changes in kinds.items()
    }
    plain = rows["all"]
    for panel in PANELS:
        special = rows[panel.arms]
        assert set(panel.keys) <= special.keys(), panel.title
        if panel.arms == "all":
            assert set(panel.keys) <= set(TRAINING_KEYS) and set(panel.keys) <= plain.keys(), panel.title
            assert math.isfinite(panel.values([plain])[0]), panel.title
        else:
            assert not math.isfinite(panel.values([plain])[0]), panel.title
            assert math.isfinite(panel.values([special])[0]), panel.title


def test_panels_are_distinct_and_say_what_to_notice():
    assert len({panel.title for panel in PANELS}) == len({panel.keys for panel in PANELS}) == len(PANELS)
    assert all(panel.title and panel.unit and panel.notice.endswith((".", "?")) for panel in PANELS)


def test_values_of_a_panel_with_two_keys_are_a_quotient():
    panel = next(panel for panel in PANELS if len(panel.keys) == 2)
    rows = [dict(zip(panel.keys, pair, strict=True)) for pair in ((1, 4), (0, 4), (0, 0), (None, 4))] + [{}]
    found = panel.values(rows).tolist()
    assert found[:2] == [0.25, 0] and all(map(math.isnan, found[2:]))


def test_what_a_run_draws_is_known_by_its_configuration():
    critic = next(panel for panel in PANELS if panel.arms == "ppo")
    assert critic.shown_for({ALGORITHM: {"value": "ppo"}})
    assert not critic.shown_for({ALGORITHM: {"value": "grpo"}}) and not critic.shown_for({})
    panel = next(panel for panel in PANELS if panel.arms == "corrected")
    assert panel.shown_for({CORRECTION: {"value": True}})
    assert not panel.shown_for({CORRECTION: {"value": False}}) and not panel.shown_for({})
