"""Held-out reward, greedy: the number a user looks at before and after.

N: held-out rows, F: reward functions.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlinvariant.held_out import HeldOut
from rlinvariant.metrics import mean
from rlinvariant.trainer.grading import weighted_sums
from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from rlinvariant.trainer.player import play

if TYPE_CHECKING:
    from datasets import Dataset


def greedy_reward(trainer: InvariantGRPOTrainer, dataset: "Dataset") -> HeldOut:
    """Compute the mean reward of one greedy completion per row of `dataset`, with the trainer's current weights.

    The completions are decoded and graded by what trains: TRL calls the rewards, functions, coroutines and reward models, in
    fp32, and they are weighted as the trainer weighs them. A reward that does not apply to a row counts 0, and a row to which
    none applies is left out; NaN where that is every row. Every rank must call this: each draws and scores its share of the
    rows, and all return the mean over all rows.
    """
    rows, rank, ranks = dataset.to_list(), trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = -(-len(rows) // ranks)
    own = [rows[i % len(rows)] for i in range(rank * share, (rank + 1) * share)]  # the last ranks' are filled up
    with _greedy(trainer):
        rewards_NF = play(trainer, own).rewards_NF[: len(rows)]
    rewards = [reward for reward in weighted_sums(rewards_NF, trainer.reward_weights) if not math.isnan(reward)]
    return HeldOut(mean(rewards), bool(rewards) and all(reward in (0, 1) for reward in rewards))


@contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """Draw the likeliest tokens, and leave no trace in what is counted of training and of TRL's evaluations."""
    names = ("_metrics", "_pending_metrics", "_pending_extra_logs", "temperature", "_seeded")
    kept, was_training = {name: getattr(trainer, name) for name in names}, trainer.model.training
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
    trainer.temperature, trainer._seeded = 0.0, {}
    reports, trainer.args.report_to = trainer.args.report_to, []  # TRL's timers would write to a tracker that has no run now
    trainer.model.eval()
    try:
        yield
    finally:
        vars(trainer).update(kept)
        trainer.args.report_to = reports
        trainer.model.train(was_training)
