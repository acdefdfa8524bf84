"""Settings under which sampler and trainer could not be one function, listed for our configuration and for TRL scripts."""

from collections.abc import Mapping
from typing import Any, Literal

from rlinvariant.text import shown

Invariance = Literal["exact", "off", "sampler", "trainer"]
"""The sides that run the invariant ops: both, none, or that one only."""
SIDES: dict[Invariance, tuple[bool, bool]] = {
    "exact": (True, True),
    "off": (False, False),
    "sampler": (True, False),
    "trainer": (False, True),
}
"""invariance -> which of (sampler, trainer) runs the invariant ops."""
INVARIANCE = tuple(SIDES)


def conflicts(trainer: Any, invariance: str, env: Mapping[str, str], prefix: str = "") -> list[str]:
    """List what in `trl.GRPOConfig`'s fields and the environment contradicts `invariance`, one line each.

    A line says the key, its value, what is expected, and the fix.

    Args:
        trainer: anything that has GRPOConfig's fields.
        invariance: "exact", "off", "sampler" or "trainer".
        env: environment variables.
        prefix: what the user writes before a field's name.
    """
    found: list[str] = []

    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            value = getattr(trainer, name)
            found.append(f"{prefix}{name}={shown(getattr(value, 'value', value))}: expected {expected}")

    whole = "the sampler must draw from the whole distribution, which is the one that is trained; remove it"
    least = "at least 0.01, to which vLLM raises smaller ones; 1.0 samples from the model itself"
    require(trainer.temperature >= 0.01, "temperature", least)
    require(trainer.top_p == 1.0, "top_p", f"1.0: {whole}")
    require(trainer.top_k in (0, -1, None), "top_k", f"0: {whole}")
    require(not trainer.min_p, "min_p", f"None: {whole}")
    require(trainer.repetition_penalty == 1.0, "repetition_penalty", f"1.0: {whole}")
    require(not trainer.generation_kwargs, "generation_kwargs", f"None: {whole}")
    require(not trainer.trust_remote_code, "trust_remote_code", "False: no code of a model's repository is run; remove it")
    require(trainer.logging_steps == 1, "logging_steps", "1: every step is counted and written; remove it")
    strategy = getattr(trainer.logging_strategy, "value", trainer.logging_strategy)
    resumable = "False: a run could not go on from such a checkpoint; remove it"
    require(not trainer.save_only_model, "save_only_model", resumable)
    again = "False: a resumed run would be given the first prompts again; remove it"
    require(not trainer.ignore_data_skip, "ignore_data_skip", again)
    two = "at least 2, or None for all: if the newest is damaged, a run goes on from the one before"
    require(trainer.save_total_limit is None or trainer.save_total_limit >= 2, "save_total_limit", two)
    require(strategy == "steps", "logging_strategy", "steps: every step is counted and written; remove it")

    if invariance in ("exact", "trainer"):
        mode = f"with invariance={invariance}"
        masters = f"False {mode}: masters stay float32 and the modules cast; use dtype=bfloat16"
        require(trainer.bf16 is False, "bf16", masters)  # None means True to TRL
        for name in ("fp16", "bf16_full_eval", "fp16_full_eval"):
            require(not getattr(trainer, name), name, masters)
        replaced = f"False {mode}: it replaces operations that the invariant ops own; remove it"
        for name in ("use_liger_kernel", "cast_lm_head_to_fp32", "torch_compile"):
            require(not getattr(trainer, name), name, replaced)
        noise = f"None {mode}: the noise is in the trainer's forward alone; remove it"
        require(not trainer.neftune_noise_alpha, "neftune_noise_alpha", noise)
        if invariance == "exact":
            dropped = "False with invariance=exact: TRL drops truncated completions before they could be compared; remove it"
            require(not trainer.mask_truncated_completions, "mask_truncated_completions", dropped)
    found += environment_conflicts(env, invariance, bool(trainer.bf16 or trainer.fp16))
    return found


def ppo_conflicts(trainer: Any, ppo: Any, prefix: str = "") -> list[str]:
    """List PPO's settings that are out of range, and TRL's settings that have no part in PPO, one line each.

    Args:
        trainer: anything that has GRPOConfig's fields.
        ppo: a `config.PPOConfig`.
        prefix: what the user writes before a field's name of `trainer`.
    """
    found: list[str] = []

    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            found.append(f"ppo.{name}={shown(getattr(ppo, name))}: expected {expected}")

    def leave(name: str, *values: Any, why: str) -> None:
        value = getattr(trainer, name)
        if value not in values:
            found.append(
                f"{prefix}{name}={shown(getattr(value, 'value', value))}: expected {values[0]} with algorithm=ppo: {why}"
            )

    require(0 <= ppo.gamma <= 1, "gamma", "0 to 1")
    require(0 <= ppo.lam <= 1, "lam", "0 to 1")
    require(0 <= ppo.kl_coef < float("inf"), "kl_coef", "0 or more")
    require(ppo.value_clip is None or ppo.value_clip > 0, "value_clip", "more than 0, or None for no clipping")
    rate = ppo.critic_learning_rate
    require(rate is None or rate >= 0, "critic_learning_rate", "0 or more, or None for trainer.learning_rate")
    require(ppo.value_warmup_steps >= 0, "value_warmup_steps", "0 or more optimizer steps")
    require(ppo.target_kl is None or ppo.target_kl > 0, "target_kl", "more than 0, or None for no limit")
    leave("loss_type", "dapo", why="the losses are means over the tokens of a step; remove it")
    leave("beta", 0.0, why="the penalty is in the rewards; use ppo.kl_coef")
    leave("scale_rewards", "group", True, why="advantages come from the critic, not from groups; remove it")
    leave(
        "multi_objective_aggregation", "sum_then_normalize", why="rewards are summed, and never compared in groups; remove it"
    )
    leave("importance_sampling_level", "token", why="each token has a ratio and an advantage of its own; remove it")
    leave("off_policy_mask_threshold", None, why="it judges whole completions by one advantage; use ppo.target_kl")
    leave("mask_truncated_completions", False, why="a masked completion has no token to carry its reward; remove it")
    leave("load_best_model_at_end", False, why="the critic would stay the last one; remove it")
    leave("fp16", False, why="the critic's gradients are not scaled; remove it")
    return found


def environment_conflicts(env: Mapping[str, str], invariance: str, autocast_asked: bool = False) -> list[str]:
    """List the conflicts that are in the environment, one line each.

    Args:
        env: environment variables.
        invariance: "exact", "off", "sampler" or "trainer".
        autocast_asked: bf16 or fp16 is set in GRPOConfig, for which TRL sets the variable itself.
    """
    found: list[str] = []
    autocast = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if invariance in ("exact", "trainer") and autocast != "no" and not autocast_asked:
        fix = "set mixed_precision: 'no' in the accelerate config, drop --mixed_precision, and use dtype=bfloat16"
        found.append(f"ACCELERATE_MIXED_PRECISION={shown(autocast)}: expected no with invariance={invariance}; {fix}")
    if env.get("VLLM_BATCH_INVARIANT", "0") != "0":
        value = shown(env["VLLM_BATCH_INVARIANT"])
        found.append(f"VLLM_BATCH_INVARIANT={value}: expected unset; invariance= decides; run `unset VLLM_BATCH_INVARIANT`")
    return found
