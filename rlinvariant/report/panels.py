"""What is drawn of a run: one list, from which the HTML page, the W&B workspace and the W&B report are all made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Scale = Literal["linear", "from zero", "log", "log and zero"]
CORRECTION, ALGORITHM = "trainer.vllm_importance_sampling_correction", "algorithm"


@dataclass(frozen=True)
class Panel:
    """Describes one quantity against the step.

    Attributes:
        title, unit, notice: shown; `notice` says what to look for.
        keys: of metrics.jsonl; one, or two: the first divided by the second.
        scale: "from zero" is linear with 0 in sight; "log" is linear where the values span less than a factor of ten;
            "log and zero" has a band of its own for an exact 0.
        arms: "all"; "corrected" or "ppo": only the runs in which TRL corrects by importance sampling, or with algorithm=ppo.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str
    scale: Scale
    notice: str
    arms: Literal["all", "corrected", "ppo"] = "all"

    def values(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[rows] float64 of rows of metrics.jsonl; NaN where a key is missing or null, and for 0 / 0."""
        columns = [np.array([math.nan if (x := row.get(key)) is None else x for row in rows], float) for key in self.keys]
        with np.errstate(divide="ignore", invalid="ignore"):
            return columns[0] / columns[1] if len(columns) > 1 else columns[0]

    def shown_for(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a run with this config.json has the panel's keys."""
        if self.arms == "ppo":
            return config.get(ALGORITHM, {}).get("value") == "ppo"
        return self.arms == "all" or bool(config.get(CORRECTION, {}).get("value"))


ON_POLICY, LEARNING, CRITIC, SPEED = "Sampler against trainer", "Learning", "Critic", "Speed"

PANELS = (
    Panel(ON_POLICY, "KL, sampler to trainer (k3)", ("onpolicy/kl_k3",), "nats per token", "log and zero",
          "How far the policy that sampled is from the one that is trained. Exact is 0, not small."),
    Panel(ON_POLICY, "Largest |Δ logprob| in a step", ("onpolicy/logprob_absdiff/max",), "nats", "log and zero",
          "The worst token: averages hide it, a clipped ratio does not."),
    Panel(ON_POLICY, "Tokens whose logprob differs", ("onpolicy/mismatched_tokens", "onpolicy/compared_tokens"),
          "fraction of tokens", "from zero", "Compared as 32-bit words: 0 means every bit of every token."),
    Panel(ON_POLICY, "Smallest importance ratio", ("onpolicy/is_ratio/min",), "ratio", "log",
          "1 when exact. Below 1: tokens that the trainer finds less likely than the sampler did."),
    Panel(ON_POLICY, "Mean importance ratio", ("onpolicy/is_ratio/mean",), "ratio", "linear",
          "Near 1 in every arm that samples from its own policy; far from 1, the gradient has another scale."),
    Panel(ON_POLICY, "Largest importance ratio", ("onpolicy/is_ratio/max",), "ratio", "log",
          "1 when exact. A single large ratio can dominate a gradient that is not clipped."),
    Panel(ON_POLICY, "Effective sample size", ("onpolicy/is_ess",), "fraction of tokens", "linear",
          "What weighting by the ratio would leave of the batch: 1 is all of it."),
    Panel(ON_POLICY, "Ratios of single tokens over the cap", ("onpolicy/is_clipped_frac",), "fraction of tokens", "from zero",
          "What a correction per token clips or masks. One per sequence judges the whole sequence's ratio."),
    Panel(ON_POLICY, "Mean weight that TRL's correction applied", ("sampling/importance_sampling_ratio/mean",), "weight",
          "linear", "Below 1, the correction has cut or masked something.", arms="corrected"),
    Panel(ON_POLICY, "Weight updates since the rollout", ("onpolicy/weight_version_lag",), "optimizer steps", "from zero",
          "0: sampled from the newest weights."),
    Panel(LEARNING, "Reward", ("reward/mean",), "mean of the step", "linear",
          "Does drift cost reward here? The second table answers with an interval."),
    Panel(LEARNING, "Entropy of the policy", ("policy/entropy",), "nats per token", "from zero",
          "A fall to 0 is a policy that no longer explores."),
    Panel(LEARNING, "Gradient norm", ("optim/grad_norm",), "before clipping", "log",
          "Spikes that one arm alone has."),
    Panel(LEARNING, "Length of completions", ("rollout/len_mean",), "tokens", "from zero",
          "Rewards of arms compare best where lengths do."),
    Panel(CRITIC, "Value loss", ("value/loss",), "half squared error", "log",
          "Falls as the reward stops varying, too.", arms="ppo"),
    Panel(CRITIC, "Explained variance of the returns", ("value/explained_variance",), "fraction", "linear",
          "1: the critic knows each return beforehand. 0: a constant would do as well. Below 0: it misleads.", arms="ppo"),
    Panel(CRITIC, "Mean value", ("value/mean",), "reward", "linear", "Follows the reward if the critic keeps up.", arms="ppo"),
    Panel(CRITIC, "Values held by the clip", ("value/clip_frac",), "fraction of tokens", "from zero",
          "Of further passes over a rollout; many: the critic learns in bounds.", arms="ppo"),
    Panel(CRITIC, "Largest ratio of a step", ("policy/ratio_max",), "ratio", "log",
          "New policy to the one that sampled. Exact, the first pass has 1; with drift it has not.", arms="ppo"),
    Panel(CRITIC, "KL of a step (k3)", ("policy/approx_kl",), "nats per token", "log and zero",
          "How far a rollout's further passes have moved the policy; ppo.target_kl stops them.", arms="ppo"),
    Panel(CRITIC, "Penalty for leaving the reference", ("reward/kl_penalty",), "reward of a completion", "linear",
          "What ppo.kl_coef takes off; 0 without it.", arms="ppo"),
    Panel(SPEED, "Sampler", ("perf/sampler_tok_s",), "tokens/s", "from zero", "The price of the sampler's exact kernels."),
    Panel(SPEED, "Trainer", ("perf/trainer_tok_s",), "tokens/s", "from zero",
          "Exact arms skip the pass over old log-probs, and pack."),
    Panel(SPEED, "Whole step", ("perf/step_s",), "seconds", "from zero", "Rollout, scoring, training, weight sync."),
)  # fmt: skip

KEYS = tuple(dict.fromkeys(key for panel in PANELS for key in panel.keys))
"""Every key that a panel reads."""
