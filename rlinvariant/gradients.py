"""Settings that cannot stand beside `gradients=invariant`; `trainer.leaves` says what it is."""

from typing import TYPE_CHECKING

from rlinvariant.conflicts import Invariance

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig


def gradients_problems(
    trainer: "GRPOConfig",
    gradients: str,
    processes: int,
    invariance: Invariance,
    staleness: int = 0,
    tokens: int | None = None,
    prefix: str = "",
) -> list[str]:
    """List the settings that cannot stand beside `gradients=invariant`, one line each.

    Args:
        trainer: anything that has GRPOConfig's fields; its `steps_per_generation` may be derived already, or not.
        gradients: how gradients are added.
        processes: how many train.
        invariance: which sides are exact.
        staleness: by how many optimizer steps the sampler lags.
        tokens: tokens_per_microbatch.
        prefix: what the user writes before a field's name of `trainer`.
    """
    if gradients != "invariant":
        return []
    parts, each = trainer.gradient_accumulation_steps, trainer.per_device_train_batch_size * processes
    batch, steps = trainer.generation_batch_size, trainer.steps_per_generation
    rollout = (batch or each * parts) if steps is None else each * steps
    said = f"{prefix}generation_batch_size={batch}" if steps is None else f"{prefix}steps_per_generation={steps}"
    once = f"{each * parts}" if steps is None else f"{prefix}gradient_accumulation_steps={parts}"
    alone = "a sample's gradient must not depend on the rest of its micro-batch"
    rules = (
        (processes & (processes - 1) == 0, f"num_processes={processes}", "a power of two", "each has a branch of one tree"),
        (invariance == "exact", f"invariance={invariance}", "exact", "else log-probs depend on the batch already"),
        (staleness == 0, f"staleness={staleness}", "0", "a sampler that lags has not been tried"),
        (tokens is None, f"{prefix}tokens_per_microbatch={tokens}", "None", "each sample is a pass of its own"),
        (rollout == each * parts, said, f"{once}, a rollout for each step", "processes cut a larger one into other steps"),
        (trainer.loss_type != "bnpo", f"{prefix}loss_type=bnpo", "dapo", "bnpo is a mean over the tokens of each process"),
        (not trainer.entropy_coef, f"{prefix}entropy_coef={trainer.entropy_coef}", "0", alone),
        (not trainer.use_adaptive_entropy, f"{prefix}use_adaptive_entropy=True", "False", alone),
        (trainer.top_entropy_quantile == 1, f"{prefix}top_entropy_quantile={trainer.top_entropy_quantile}", "1.0", alone),
    )
    return [
        f"{key}: expected {right} with gradients=invariant: {why}; set it, or use gradients=ordered"
        for ok, key, right, why in rules
        if not ok
    ]
