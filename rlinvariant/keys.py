"""The one definition of every number in metrics.jsonl: key, formula, unit, and its value when a run is exact.

What TRL has carries TRL's name alone; a name with a prefix of ours is of what TRL has not. `docs/reference/metrics.md` is
written from this table, and rows of earlier versions are read by it.
"""

from typing import Literal, NamedTuple

from rlinvariant.types import JsonObject, JsonRow


class Metric(NamedTuple):
    """Describes one number of a row.

    Attributes:
        key: its name in metrics.jsonl, W&B and TensorBoard.
        formula: how it is computed, of all ranks and micro-batches together.
        unit: of the number.
        exact: its value in an exact run.
    """

    key: str
    formula: str
    unit: str
    exact: str = "any"


class Section(NamedTuple):
    """Holds metrics that stand together on the page; `rows` says which rows have them."""

    title: str
    lead: str
    rows: Literal["every", "ppo", "some", "evaluation"]
    metrics: tuple[Metric, ...]


ONPOLICY = Section(
    "onpolicy: the contract",
    "With `staleness=k`, or in further passes over a rollout, two versions of the weights are compared: the numbers are "
    "counted and not required to be 0. A row of a further pass compares no token: its numbers that are "
    "derived from values are NaN.",
    "every",
    (
        Metric("onpolicy/mismatched_tokens", "tokens whose two log-probs are not the same 32 bits", "tokens", "0"),
        Metric("onpolicy/compared_tokens", "N, tokens scored by both sides", "tokens", "all that were sampled"),
        Metric("onpolicy/unscored_tokens", "sampled - compared", "tokens", "0"),
        Metric("onpolicy/coverage", "compared / sampled; 0 if none was compared", "fraction", "1"),
        Metric("onpolicy/logprob_absdiff/mean", "mean of abs(r)", "nats", "0"),
        Metric("onpolicy/logprob_absdiff/p99", "99th percentile of abs(r), a difference that occurred", "nats", "0"),
        Metric("onpolicy/logprob_absdiff/max", "largest abs(r)", "nats", "0"),
        Metric("onpolicy/ulp/max", "largest distance of two log-probs, in float32 numbers between them", "ulps", "0"),
        Metric("onpolicy/kl_k1", "mean of -r, an estimate of KL(sampler, trainer)", "nats", "0"),
        Metric("onpolicy/kl_k3", "mean of exp(r) - 1 - r, an estimate that is never negative", "nats", "0"),
        Metric("onpolicy/is_ratio/min", "smallest w", "ratio", "1"),
        Metric("onpolicy/is_ratio/mean", "mean of w", "ratio", "1"),
        Metric("onpolicy/is_ratio/max", "largest w", "ratio", "1"),
        Metric("onpolicy/is_ess", "(sum of w)² / (N × sum of w²), effective sample size", "fraction", "1"),
        Metric("onpolicy/is_clipped_frac", "fraction of w above `trainer.vllm_importance_sampling_clip_max`", "fraction", "0"),
        Metric(
            "onpolicy/group_unique_frac",
            "distinct completions within their group / completions; 1 / group size would mean that all are clones",
            "fraction",
        ),
        Metric(
            "onpolicy/masked_tokens",
            "compared tokens that `trainer.mask_truncated_completions` leaves out of the loss: the limit cut their completions",
            "tokens",
        ),
        Metric(
            "onpolicy/weights_equal",
            "1 if the sampler's weights are the trainer's, bit for bit, when the rollout was drawn",
            "0 or 1",
            "1",
        ),
        Metric(
            "onpolicy/weight_version_lag",
            "optimizer steps by which the weights that drew are older than those that train",
            "steps",
            "0, or `staleness`",
        ),
        Metric("onpolicy/exact_streak_tokens", "tokens compared since the last mismatch, over resumes too", "tokens", "grows"),
        Metric("onpolicy/mismatched_tokens_total", "mismatched tokens of the run so far, over resumes too", "tokens", "0"),
    ),
)
REWARD = Section(
    "reward",
    "Of the completions that were drawn in this step; of a step that draws none, as it trains on an earlier rollout, of the "
    "last step that drew. A completion's reward is the weighted sum that trains it, over the functions that apply to it, in "
    "float32; a completion to which none applies has none, and is in no mean.",
    "every",
    (
        Metric("reward", "mean of the completions' rewards", "reward"),
        Metric("reward_std", "their standard deviation, with N - 1", "reward"),
        Metric("frac_reward_zero_std", "completions in groups whose rewards are all equal, and so train nothing", "fraction"),
        Metric(
            "reward/errors",
            "samples for which a reward function raised or gave no number, and batches that it failed on though on no sample "
            "alone; 0 where `reward_errors=stop`, which ends the run",
            "failures",
            "0",
        ),
        Metric("reward/timeouts", "as `reward/errors`: no answer in time, in the cage", "failures", "0"),
        Metric("reward/crashes", "as `reward/errors`: the function's process ended, in the cage", "failures", "0"),
    ),
)
COMPLETIONS = Section(
    "completions",
    "Of the same completions as `reward`. A completion is *terminated* if its last token ends it, else it was cut.",
    "every",
    (
        Metric("completions/mean_length", "mean length of a completion", "tokens"),
        Metric("completions/min_length", "shortest completion", "tokens"),
        Metric("completions/max_length", "longest completion", "tokens"),
        Metric("completions/clipped_ratio", "completions that were cut / completions", "fraction"),
        Metric("completions/mean_terminated_length", "mean length of the terminated ones; 0 if there are none", "tokens"),
        Metric("completions/min_terminated_length", "shortest of them; 0 if there are none", "tokens"),
        Metric("completions/max_terminated_length", "longest of them; 0 if there are none", "tokens"),
        Metric("rollout/empty_frac", "completions without a token / completions", "fraction"),
    ),
)
POLICY = Section(
    "policy",
    "Of all tokens that the step trains on, which a mean of the means of micro-batches is not. With sequence ratios "
    "(`trainer.importance_sampling_level=sequence`) what is clipped is a sequence.",
    "every",
    (
        Metric("entropy", "mean entropy of the policy at the sampled tokens", "nats"),
        Metric(
            "clip_ratio/region_mean",
            "tokens whose ratio was clipped, at either end / tokens; NaN where the loss clips otherwise or not at all",
            "fraction",
            "0 in the first pass over a rollout",
        ),
        Metric(
            "policy/approx_kl",
            "as `kl_k3`, from the policy that sampled to the one that is trained, over passes in which it had moved already; "
            "NaN where there are none. PPO: over the step",
            "nats",
            "NaN, or any",
        ),
    ),
)
OPTIM = Section(
    "optimizer",
    "`loss` and `grad_norm` are those that trained: float32 sums in the order in which micro-batches and ranks were added, "
    "which round otherwise for another number of them. The loss of `loss_type=bnpo`, and the bonus of "
    "`entropy_coef`, are means of the means of micro-batches by TRL's definition, and depend on their number. "
    "No other number does.",
    "every",
    (
        Metric("loss", "the loss of the step", "loss"),
        Metric("grad_norm", "norm of the policy's gradient, before clipping", "norm"),
        Metric("learning_rate", "learning rate of the step", "1"),
        Metric("num_tokens", "tokens of prompts and completions that the run has drawn", "tokens"),
    ),
)
PROMPTS = Section(
    "turns and prompts",
    "Of what the step drew. What comes from the prefix cache depends, as clocks do, on which requests meet in an engine, and "
    "changes no bit.",
    "every",
    (
        Metric("rollout/turns", "turns that were drawn / completions; NaN in a step that draws none", "turns"),
        Metric(
            "perf/prefill_tokens",
            "tokens of prompts that the sampler computed; what is computed again after a preemption is not counted",
            "tokens",
        ),
        Metric("perf/cached_tokens", "tokens of prompts that the sampler took from its prefix cache", "tokens"),
        Metric(
            "perf/later_prefill_tokens",
            "of `perf/prefill_tokens`, those of turns after a sample's first: what was said since, and what fills no page",
            "tokens",
        ),
        Metric("perf/later_cached_tokens", "of `perf/cached_tokens`, those of turns after a sample's first", "tokens"),
    ),
)
TIME = Section(
    "time",
    "Each is that of the slowest rank.",
    "every",
    (
        Metric("step_time", "the whole step by the clock, checkpoint and log included", "seconds"),
        Metric("time/rollout", "sampling", "seconds"),
        Metric("time/tools", "tools and environments, and what chat template and tokenizer make of their results", "seconds"),
        Metric("time/score", "log-probs in a pass of their own, which exactness makes needless, and rewards", "seconds"),
        Metric("time/train", "forward, backward, optimizer", "seconds"),
        Metric("time/sync", "weights from the trainer to the sampler", "seconds"),
        Metric("time/save", "checkpoints and recorded rollouts before the step of this row", "seconds"),
        Metric("perf/sampler_tok_s", "sampled tokens / `time/rollout`", "tokens/s"),
        Metric("perf/trainer_tok_s", "tokens trained on / `time/train`", "tokens/s"),
    ),
)
PPO = Section(
    "value: PPO alone",
    "`value/mean`, `value/explained_variance` and `reward/kl_penalty` are of the rollout that the step trains on. Ratios, to "
    "the policy that sampled, and `value/loss` are of the step itself, before it moves anything. What a skipped step did not "
    "compute is NaN.",
    "ppo",
    (
        Metric("value/loss", "mean over tokens of half the clipped squared error of the value", "reward²"),
        Metric("value/explained_variance", "1 - variance(return - value) / variance(return)", "fraction"),
        Metric("value/mean", "mean value over tokens", "reward"),
        Metric("value/clip_frac", "tokens whose value was clipped / tokens", "fraction"),
        Metric("value/grad_norm", "norm of the critic's gradient, before clipping", "norm"),
        Metric("value/lr", "the critic's learning rate", "1"),
        Metric("policy/ratio_mean", "mean ratio of the policy to the one that sampled", "ratio", "1 in a first pass"),
        Metric("policy/ratio_min", "smallest ratio", "ratio", "1 in a first pass"),
        Metric("policy/ratio_max", "largest ratio", "ratio", "1 in a first pass"),
        Metric(
            "policy/early_stopped",
            "1 if the step was skipped, the policy having moved further than `ppo.target_kl`",
            "0 or 1",
        ),
        Metric("reward/kl_penalty", "mean over completions of the reward lost for leaving the first policy", "reward"),
    ),
)
SOME = Section(
    "where there is such a thing",
    "NAME is a reward function's name; the second function of one name has `_2` behind it. What a reward function logs by "
    "`log_metric` stands under the name that it gives, as the mean over its calls.",
    "some",
    (
        Metric("rewards/NAME/mean", "mean reward of the function, where it applies", "reward"),
        Metric("rewards/NAME/std", "its standard deviation, with N - 1", "reward"),
        Metric("kl", "`trainer.beta` not 0: mean over tokens of exp(d) - 1 - d, d = reference - policy", "nats"),
        Metric("clip_ratio/low_mean", "tokens clipped at the lower end / tokens", "fraction", "0 in a first pass"),
        Metric("clip_ratio/low_min", "the least such fraction of a sequence", "fraction", "0 in a first pass"),
        Metric("clip_ratio/high_mean", "tokens clipped at the upper end / tokens", "fraction", "0 in a first pass"),
        Metric("clip_ratio/high_max", "the largest such fraction of a sequence", "fraction", "0 in a first pass"),
        Metric("cispo_clip_ratio", "`loss_type=cispo`: tokens whose ratio was held / tokens", "fraction", "0 in a first pass"),
        Metric("vespo/phi_seq_mean", "`loss_type=vespo`: mean weight of a sequence", "weight"),
        Metric(
            "lora/merged_share",
            "adapters with `invariance=off`: sum of (W' - W) B A / sum of (B A)², W' = W + B A, rounded for the sampler",
            "fraction",
        ),
        Metric(
            "onpolicy/router_flips",
            "a mixture, beside an engine of the trainer's own that is not compiled (else the start says why not): compared "
            "tokens whose predicting position went to other experts in the sampler than in the trainer, in any layer",
            "tokens",
            "0",
        ),
        Metric("onpolicy/router_flips/I", "the same in the I-th layer with experts, from 0", "tokens", "0"),
        Metric("policy_loss", "with an entropy bonus: the loss without it", "loss"),
        Metric("entropy_coef", "with an entropy bonus: its coefficient", "1"),
        Metric(
            "sampling/sampling_logp_difference/mean",
            "with TRL's correction: mean over tokens of abs(old log-prob - sampler's)",
            "nats",
            "0",
        ),
        Metric("sampling/sampling_logp_difference/max", "with TRL's correction: the largest", "nats", "0"),
        Metric("sampling/importance_sampling_ratio/min", "with TRL's correction: smallest weight applied", "weight", "1"),
        Metric("sampling/importance_sampling_ratio/mean", "with TRL's correction: mean weight applied", "weight", "1"),
        Metric("sampling/importance_sampling_ratio/max", "with TRL's correction: largest weight applied", "weight", "1"),
    ),
)
EVALUATION = Section(
    "evaluation",
    'These are in rows of their own, `{"kind": "evaluation", "step": ...}`, `step` being how many steps were trained: '
    "`heldout/reward` before the first step and after the last one, the others as `trainer.eval_strategy` asks. Of several "
    "evaluation sets, the name stands behind `eval_`: `eval_easy_reward`.",
    "evaluation",
    (
        Metric(
            "heldout/reward",
            "mean reward of one greedy completion per held-out row, by the reward functions and weights that train; called "
            "accuracy, in result.json and reports, where each of them is 0 or 1",
            "reward",
        ),
        Metric("eval_reward", "mean reward of completions drawn for the rows of the evaluation set", "reward"),
        Metric("eval_KEY", "every other key of this page that TRL has, of the evaluation's completions", "its own"),
        Metric("eval_loss", "the loss, with TRL's old log-probs of the same weights", "loss"),
        Metric("eval_runtime", "the evaluation by the clock", "seconds"),
    ),
)
SECTIONS = (ONPOLICY, REWARD, COMPLETIONS, PROMPTS, POLICY, OPTIM, TIME, PPO, SOME, EVALUATION)


def keys(*sections: Section) -> tuple[str, ...]:
    """Return the keys of some sections, in order."""
    return tuple(metric.key for section in sections for metric in section.metrics)


KEYS = keys(*(section for section in SECTIONS if section.rows == "every"))
"""Every key that a step's row of metrics.jsonl has, whether invariance is on or off."""

PPO_KEYS = keys(PPO)
"""The keys that a step's row has besides with algorithm=ppo."""

EVALUATED = "evaluation"
"""The `kind` of a row that is not a step's."""

CLOCKS = ("time/", "perf/", "step_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "profiling/")
"""The beginnings of the keys whose numbers differ from one run to the same run again."""

RENAMED = {
    "reward/mean": "reward",
    "rollout/len_mean": "completions/mean_length",
    "rollout/len_max": "completions/max_length",
    "rollout/truncated_frac": "completions/clipped_ratio",
    "policy/entropy": "entropy",
    "policy/clip_frac": "clip_ratio/region_mean",
    "optim/loss": "loss",
    "optim/grad_norm": "grad_norm",
    "optim/lr": "learning_rate",
    "perf/step_s": "step_time",
}
"""The keys of earlier versions, which had these numbers twice, and those of today."""


def renamed(row: JsonRow) -> JsonObject:
    """Return a row, of any version, with the keys of today."""
    kept = {key: value for key, value in row.items() if key not in RENAMED}
    return kept | {RENAMED[key]: value for key, value in row.items() if key in RENAMED}
