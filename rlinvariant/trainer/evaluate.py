"""Held-out reward, greedy: the number a user looks at before and after.

N: held-out rows, F: reward functions.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlinvariant.trainer.grading import call_rewards
from rlinvariant.trainer.grpo import InvariantGRPOTrainer

if TYPE_CHECKING:
    from datasets import Dataset


def greedy_reward(trainer: InvariantGRPOTrainer, dataset: "Dataset") -> float:
    """Compute the mean reward of one greedy completion per row of `dataset`, with the trainer's current weights.

    TRL calls the rewards, as it does in training: functions, async ones and reward models, in fp32, weighted as the trainer
    weighs them; a reward that does not apply to a row counts 0. Every rank must call this: each draws and scores its share of
    the rows, and all return the mean over all rows.
    """
    rows, rank, ranks = dataset.to_list(), trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = -(-len(rows) // ranks)
    own = [rows[i % len(rows)] for i in range(rank * share, (rank + 1) * share)]  # the last ranks' are filled up
    prompts: list[Any] = [row["prompt"] for row in own]
    trainer.sync()
    completions = trainer.sampler.generate(
        trainer._tokenize_prompts(prompts)[0],
        [0] * len(own),
        temperature=0.0,
        max_tokens=trainer.max_completion_length,
        stop_token_ids=list(trainer.eos_token_ids),
    )
    ids = [completion.token_ids for completion in completions]
    tokenizer: Any = trainer.processing_class
    texts: list[Any] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if isinstance(prompts[0], list):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    with _unlogged(trainer):
        rewards_NF = call_rewards(trainer, own, prompts, texts, ids)[: len(rows)].double().cpu()
    return (rewards_NF * trainer.reward_weights.double().cpu()).nansum(1).mean().item()


@contextmanager
def _unlogged(trainer: Any) -> Iterator[None]:
    """Drop what reward functions log: it is not of a training step."""
    kept = trainer._pending_metrics, trainer._pending_extra_logs
    trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
    try:
        yield
    finally:
        trainer._pending_metrics, trainer._pending_extra_logs = kept
