"""Each request has a seed of its own: over a group, a step, the run and the ranks; and the same one in the same run."""

from unittest import mock

import pytest
from accelerate import Accelerator

from rlinvariant.trainer import InvariantGRPOTrainer
from tests.parity.harness import new_trainer, train


@pytest.fixture
def seeds_of(arithmetic_dir, exact_engine, tmp_path):
    """The seeds that the sampler was given, rollout by rollout, and the completions of each."""

    def record(**changes):
        calls, generate = [], exact_engine.generate

        def recording(prompts, seeds, **kwargs):
            completions = generate(prompts, seeds, **kwargs)
            calls.append((list(map(tuple, prompts)), list(seeds), [tuple(c.token_ids) for c in completions]))
            return completions

        with mock.patch.object(exact_engine, "generate", recording):
            run = train(arithmetic_dir, exact_engine, tmp_path, **changes)
        return run, calls

    return record


def test_the_samples_of_a_group_are_distinct(seeds_of):
    run, calls = seeds_of()
    for prompts, seeds, completions in calls:
        assert len(set(seeds)) == 16
        for i in range(0, 16, 4):  # a group: one prompt, four samples
            assert len(set(prompts[i : i + 4])) == 1 and len(set(completions[i : i + 4])) == 4
    assert [row["onpolicy/group_unique_frac"] for row in run.rows] == [1.0, 1.0]


def test_one_seed_for_all_would_clone_a_group(seeds_of):
    """Control: `group_unique_frac` shows the failure that seeds of their own prevent."""
    with mock.patch.object(InvariantGRPOTrainer, "_seeds", lambda self, count, group: [7] * count):
        run, _ = seeds_of()
    assert [row["onpolicy/group_unique_frac"] for row in run.rows] == [0.25, 0.25]


def test_seeds_are_distinct_over_prompts_steps_and_rollouts(seeds_of):
    _, calls = seeds_of(max_steps=3, gradient_accumulation_steps=2, steps_per_generation=1)
    seeds = [seed for _, seeds, _ in calls for seed in seeds]
    assert len(calls) == 6 and len(set(seeds)) == len(seeds) == 6 * 16


def test_seeds_are_those_of_the_run(seeds_of):
    first, again, other = (seeds_of(seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert not {s for _, seeds, _ in first for s in seeds} & {s for _, seeds, _ in other for s in seeds}


def test_seeds_differ_between_ranks(arithmetic_dir, exact_engine, tmp_path):
    """Two ranks with 6 requests each and groups of 4: the group that they share goes on counting on the second rank."""

    def of_rank(rank: int, count: int) -> list[int]:
        trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer
        with mock.patch.object(Accelerator, "process_index", rank):
            return trainer._seeds(count, 4)

    assert of_rank(0, 6) + of_rank(1, 6) == of_rank(0, 12)
    assert len(set(of_rank(0, 12))) == 12


def test_evaluation_draws_seeds_of_its_own(arithmetic_dir, exact_engine, tmp_path):
    trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer
    seeds = []
    for mode in (True, False, True, False):
        trainer.model.train(mode)
        seeds += trainer._seeds(16, 4)
    assert len(set(seeds)) == 4 * 16
