"""Held-out reward, greedy: the number a user looks at before and after."""

import inspect
from typing import Any

from rlinvariant.trainer.grpo import InvariantGRPOTrainer


def greedy_reward(trainer: InvariantGRPOTrainer, dataset: Any) -> float | None:
    """Mean reward of one greedy completion per row of `dataset`, with the sampler's current weights.

    Rewards are the trainer's functions, weighted as it weighs them; reward models are left out. Runs on this process
    alone.
    """
    rows = dataset.to_list()
    prompts = [row["prompt"] for row in rows]
    prompt_ids = trainer._tokenize_prompts(prompts)[0]
    completions = trainer.sampler.generate(
        prompt_ids,
        [0] * len(rows),
        temperature=0.0,
        max_tokens=trainer.max_completion_length,
        stop_token_ids=list(trainer.eos_token_ids),
    )
    ids = [c.token_ids for c in completions]
    tokenizer: Any = trainer.processing_class
    texts: list[Any] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if isinstance(prompts[0], list):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    total, found = 0.0, 0
    for function, weight in zip(trainer.reward_funcs, trainer.reward_weights.tolist(), strict=True):
        if not callable(function) or hasattr(function, "forward") or inspect.iscoroutinefunction(function):
            continue
        values = function(
            prompts=prompts,
            completions=texts,
            completion_ids=ids,
            trainer_state=trainer.state,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        total += weight * sum(v or 0.0 for v in values) / len(rows)
        found += 1
    return total if found else None
