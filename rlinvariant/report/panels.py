"""The list of what is drawn of a run, from which the HTML page, the W&B workspace and the W&B report are all made."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlinvariant.types import JsonRow

Scale = Literal["linear", "from zero", "log", "log and zero"]
Kind = Literal["curve", "stack"]
FLIPS = "onpolicy/router_flips"
"""Key of the tokens that a mixture sent to other experts; behind it, /I, those of its I-th layer with experts."""
CORRECTION, ALGORITHM = "trainer.vllm_importance_sampling_correction", "algorithm"


@dataclass(frozen=True)
class Panel:
    """Describes one quantity against the step.

    Attributes:
        title, unit, notice: shown; `notice` says what to look for.
        keys: of metrics.jsonl; one, or two: the first divided by the second. Of a stack, its parts, from the bottom up.
        scale: "from zero" is linear with 0 in sight; "log" is linear where the values span less than a factor of ten;
            "log and zero" has a band of its own for an exact 0.
        of: which rows have the keys.
        ideal: the value of every step of an exact run that trains on its newest rollout, where there is such a value.
        kind: "stack" is drawn of each arm by itself, as parts of a whole.
        arms: "all"; "corrected" or "ppo": only the runs in which TRL corrects by importance sampling, or with algorithm=ppo.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str
    scale: Scale
    notice: str
    arms: Literal["all", "corrected", "ppo"] = "all"
    of: Literal["steps", "evaluations"] = "steps"
    ideal: float | None = None
    kind: Kind = "curve"

    def values(self, rows: Sequence[JsonRow]) -> np.ndarray:
        """Return [rows] float64 from rows of metrics.jsonl; NaN where a key is missing or null, and for 0 / 0.

        Of a stack, the whole: parts that a row lacks count as 0.
        """
        columns = [column(rows, key) for key in self.keys]
        if self.kind == "stack":
            known = [np.isfinite(part) for part in columns]
            return np.where(np.any(known, axis=0), np.nansum(columns, axis=0), math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return columns[0] / columns[1] if len(columns) > 1 else columns[0]

    def shown_for(self, config: JsonRow) -> bool:
        """Tell whether a run with this config.json has the panel's keys."""
        if self.arms == "ppo":
            return config.get(ALGORITHM, {}).get("value") == "ppo"
        return self.arms == "all" or bool(config.get(CORRECTION, {}).get("value"))


def column(rows: Sequence[JsonRow], key: str) -> np.ndarray:
    """Return [rows] float64, the values of one key; NaN where it is missing or null."""
    return np.array([math.nan if (x := row.get(key)) is None else x for row in rows], float)


REWARD, ON_POLICY, TRAINING, CRITIC, SPEED = "Reward", "Sampler against trainer", "Training", "Critic", "Speed"

PANELS = (
    Panel(REWARD, "Reward", ("reward",), "mean of the step", "linear", "Of all completions of a step, weighted as they train."),
    Panel(
        section=REWARD,
        title="Spread of rewards",
        keys=("reward_std",),
        unit="standard deviation",
        scale="from zero",
        notice="Advantages come from it: without spread there is nothing to learn.",
    ),
    Panel(
        section=REWARD,
        title="Groups without signal",
        keys=("frac_reward_zero_std",),
        unit="fraction of completions",
        scale="from zero",
        notice="All rewards of the group are equal: too hard, or done. They train nothing.",
    ),
    Panel(
        section=ON_POLICY,
        title="KL, sampler to trainer (k3)",
        keys=("onpolicy/kl_k3",),
        unit="nats per token",
        scale="log and zero",
        notice="How far the policy that sampled is from the one that is trained. Exact is 0, not small.",
        ideal=0.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Largest |Δ logprob| in a step",
        keys=("onpolicy/logprob_absdiff/max",),
        unit="nats",
        scale="log and zero",
        notice="The worst token: averages hide it, a clipped ratio does not.",
        ideal=0.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Tokens whose logprob differs",
        keys=("onpolicy/mismatched_tokens", "onpolicy/compared_tokens"),
        unit="fraction of tokens",
        scale="from zero",
        notice="Compared as 32-bit words: 0 means every bit of every token.",
        ideal=0.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Smallest importance ratio",
        keys=("onpolicy/is_ratio/min",),
        unit="ratio",
        scale="log",
        notice="1 when exact. Below 1: tokens that the trainer finds less likely than the sampler did.",
        ideal=1.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Mean importance ratio",
        keys=("onpolicy/is_ratio/mean",),
        unit="ratio",
        scale="linear",
        notice="Near 1 in every arm that samples from its own policy; far from 1, the gradient has another scale.",
        ideal=1.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Largest importance ratio",
        keys=("onpolicy/is_ratio/max",),
        unit="ratio",
        scale="log",
        notice="1 when exact. A single large ratio can dominate a gradient that is not clipped.",
        ideal=1.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Effective sample size",
        keys=("onpolicy/is_ess",),
        unit="fraction of tokens",
        scale="linear",
        notice="What weighting by the ratio would leave of the batch: 1 is all of it.",
        ideal=1.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Ratios of single tokens over the cap",
        keys=("onpolicy/is_clipped_frac",),
        unit="fraction of tokens",
        scale="from zero",
        notice="What a correction per token clips or masks. One per sequence judges the whole sequence's ratio.",
        ideal=0.0,
    ),
    Panel(
        section=ON_POLICY,
        title="Mean weight that TRL's correction applied",
        keys=("sampling/importance_sampling_ratio/mean",),
        unit="weight",
        scale="linear",
        notice="Below 1, the correction has cut or masked something.",
        arms="corrected",
    ),
    Panel(
        section=ON_POLICY,
        title="Weight updates since the rollout",
        keys=("onpolicy/weight_version_lag",),
        unit="optimizer steps",
        scale="from zero",
        notice="0: sampled from the newest weights.",
        ideal=0.0,
    ),
    Panel(TRAINING, "Loss", ("loss",), "of the step", "linear", "On policy it is near 0 by construction: look at its trend."),
    Panel(TRAINING, "Gradient norm", ("grad_norm",), "before clipping", "log", "Spikes that one arm alone has."),
    Panel(TRAINING, "Learning rate", ("learning_rate",), "of the step", "from zero", "Warm-up and decay, as they were."),
    Panel(
        section=TRAINING,
        title="Entropy of the policy",
        keys=("entropy",),
        unit="nats per token",
        scale="from zero",
        notice="A fall to 0 is a policy that no longer explores.",
    ),
    Panel(
        section=TRAINING,
        title="Length of completions",
        keys=("completions/mean_length",),
        unit="tokens",
        scale="from zero",
        notice="Rewards of arms compare best where lengths do.",
    ),
    Panel(
        section=TRAINING,
        title="Completions that were cut",
        keys=("completions/clipped_ratio",),
        unit="fraction of completions",
        scale="from zero",
        notice="They met the limit of tokens before they ended.",
    ),
    Panel(
        section=CRITIC,
        title="Value loss",
        keys=("value/loss",),
        unit="half squared error",
        scale="log",
        notice="Falls as the reward stops varying, too.",
        arms="ppo",
    ),
    Panel(
        section=CRITIC,
        title="Explained variance of the returns",
        keys=("value/explained_variance",),
        unit="fraction",
        scale="linear",
        notice="1: the critic knows each return beforehand. 0: a constant would do as well. Below 0: it misleads.",
        arms="ppo",
    ),
    Panel(CRITIC, "Mean value", ("value/mean",), "reward", "linear", "Follows the reward if the critic keeps up.", arms="ppo"),
    Panel(
        section=CRITIC,
        title="Values held by the clip",
        keys=("value/clip_frac",),
        unit="fraction of tokens",
        scale="from zero",
        notice="Of further passes over a rollout; many: the critic learns in bounds.",
        arms="ppo",
    ),
    Panel(
        section=CRITIC,
        title="Largest ratio of a step",
        keys=("policy/ratio_max",),
        unit="ratio",
        scale="log",
        notice="New policy to the one that sampled. Exact, the first pass has 1; with drift it has not.",
        arms="ppo",
    ),
    Panel(
        section=CRITIC,
        title="KL of a step (k3)",
        keys=("policy/approx_kl",),
        unit="nats per token",
        scale="log and zero",
        notice="How far a rollout's further passes have moved the policy; ppo.target_kl stops them.",
        arms="ppo",
    ),
    Panel(
        section=CRITIC,
        title="Penalty for leaving the reference",
        keys=("reward/kl_penalty",),
        unit="reward of a completion",
        scale="linear",
        notice="What ppo.kl_coef takes off; 0 without it.",
        arms="ppo",
    ),
    Panel(
        section=SPEED,
        title="Time of a step by part",
        keys=("time/rollout", "time/tools", "time/score", "time/train", "time/sync", "time/save"),
        unit="seconds",
        scale="from zero",
        notice="Sampling, tools, scoring, training, weights to the sampler, checkpoints.",
        kind="stack",
    ),
    Panel(SPEED, "Whole step", ("step_time",), "seconds", "from zero", "By the clock, with what no part counts."),
    Panel(SPEED, "Sampler", ("perf/sampler_tok_s",), "tokens/s", "from zero", "The price of the sampler's exact kernels."),
    Panel(
        section=SPEED,
        title="Trainer",
        keys=("perf/trainer_tok_s",),
        unit="tokens/s",
        scale="from zero",
        notice="Exact arms skip the pass over old log-probs, and pack.",
    ),
    Panel(
        section=SPEED,
        title="Cached prompt tokens for each computed one",
        keys=("perf/cached_tokens", "perf/prefill_tokens"),
        unit="ratio",
        scale="from zero",
        notice="A group shares its prompt, and a turn costs its new tokens alone.",
    ),
)


def of_evaluations(rows: Iterable[JsonRow]) -> list[Panel]:
    """Return a panel for each reward that rows of evaluations have: the held-out one, and that of each evaluation set."""
    found = dict.fromkeys(key for row in rows for key in row if key == "heldout/reward" or key.endswith("_reward"))
    said = {"heldout/reward": ("Held-out reward", "Greedy, before and after training, by the rewards that train.")}
    other = "Sampled as in training, at the steps that trainer.eval_strategy asks for."
    return [
        Panel(REWARD, title, (key,), "mean reward", "linear", notice, of="evaluations")
        for key in found
        for title, notice in [said.get(key, (key, other))]
    ]


def of_rewards(rows: Iterable[JsonRow]) -> list[Panel]:
    """Return a panel for each reward function that rows of steps name, where there are several."""
    found = dict.fromkeys(key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean"))
    names = [key.removeprefix("rewards/").removesuffix("/mean") for key in found]
    notice = "Mean where the function applies, before its weight."
    return [
        Panel(REWARD, f"Reward of {name}", (f"rewards/{name}/mean",), "mean of the step", "linear", notice)
        for name in (names if len(names) > 1 else [])
    ]


def of_routers(rows: Iterable[JsonRow]) -> list[Panel]:
    """Return the panel of a mixture's routers, where rows of steps count them."""
    notice = "Sampler and trainer disagree on an expert, in any layer: another expert is another function. Layers: see Numbers."
    panel = Panel(
        section=ON_POLICY,
        title="Tokens sent to other experts",
        keys=(FLIPS, "onpolicy/compared_tokens"),
        unit="fraction of tokens",
        scale="from zero",
        notice=notice,
        ideal=0.0,
    )
    return [panel] if any(row.get(FLIPS) is not None for row in rows) else []


KEYS = tuple(dict.fromkeys(key for panel in PANELS for key in panel.keys))
"""Every key that a panel reads."""
