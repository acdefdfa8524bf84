"""The arms of an ablation: what may differ between runs of one recipe and one seed."""

import re
from dataclasses import dataclass

CORRECTION_MODES = {  # name in an arm -> what TRL's correction of that mode does with importance ratios beyond the cap
    "token-truncate": "each token weighted by its ratio, at most the cap",
    "token-mask": "each token weighted by its ratio, left out above the cap",
    "sequence-truncate": "each completion weighted by its ratio, at most the cap",
    "sequence-mask": "each completion weighted by its ratio, left out above the cap",
}


@dataclass(frozen=True)
class Arm:
    """Describes one setting to compare: `overrides` are what it adds to the command line of `rlinvariant train`."""

    name: str
    description: str
    overrides: tuple[str, ...]


def setting(invariance: str, staleness: int = 0, mode: str = "") -> tuple[str, ...]:
    """Return all settings that arms differ in, so that no default of a recipe gets into an arm."""
    name = "trainer.vllm_importance_sampling"
    correction = (f"{name}_correction=true", f"{name}_mode={mode.replace('-', '_')}") if mode else (f"{name}_correction=false",)
    return (f"invariance={invariance}", f"staleness={staleness}", *correction)


def stale(steps: int, mode: str = "") -> Arm:
    """Return the arm whose sampler lags by `steps` optimizer steps, with a correction if `mode` names one."""
    description = f"both sides invariant, the sampler's weights {steps} optimizer steps old"
    if mode:
        description = f"{description}; {CORRECTION_MODES[mode]}"
    return Arm(f"stale-{steps}-{mode}".rstrip("-"), description, setting("exact", steps, mode))


def truncated(side: str, top_p: str, mode: str = "") -> Arm:
    """Return the arm that draws from the likeliest tokens with `top_p` of the probability; both sides ours, or both stock."""
    trained = "both sides invariant, the kept tokens trained" if side == "exact" else "both sides stock, all tokens trained"
    description = f"{trained}; top_p={top_p}" + (f"; {CORRECTION_MODES[mode]}" if mode else "")
    settings = (*setting("exact" if side == "exact" else "off", mode=mode), f"trainer.top_p={top_p}")
    return Arm(f"{side}-top-p-{top_p}-{mode}".rstrip("-"), description, settings)


DEFAULT_ARMS = (
    Arm("exact", "both sides invariant: nothing to correct", setting("exact")),
    Arm("drift", "both sides stock, no correction", setting("off")),
    *(Arm(f"drift-{m}", f"both sides stock; {text}", setting("off", mode=m)) for m, text in CORRECTION_MODES.items()),
    Arm("sampler", "only the sampler invariant", setting("sampler")),
    Arm("trainer", "only the trainer invariant", setting("trainer")),
    stale(4),
    stale(4, "token-truncate"),
)
GRPO_ARM = Arm("grpo", "both sides invariant; GRPO in place of PPO", (*setting("exact"), "algorithm=grpo"))
"""A PPO recipe's counterpart: a group's mean in place of a critic."""
MERGED_ARM = Arm(
    "lora_merged",
    "adapters as elsewhere: merged into a stock sampler's weights at each sync, apart in a stock trainer",
    setting("off"),
)
"""A recipe with adapters as TRL trains them; `lora/merged_share` is how much of them the sampler has."""
IMPOSSIBLE_ARMS = {"fp16": "float16 on both sides: not possible, dtype has bfloat16 and float32 only"}
"""Arms that users know from elsewhere -> why they cannot run here."""


def arm_named(name: str) -> Arm | None:
    """Return the arm of that name, None if there is none.

    stale-K, stale-K-CORRECTION, exact-top-p-P, drift-top-p-P and drift-top-p-P-CORRECTION exist for every K and P.
    """
    if found := next((arm for arm in (*DEFAULT_ARMS, GRPO_ARM, MERGED_ARM) if arm.name == name), None):
        return found
    modes = "|".join(CORRECTION_MODES)
    if cut := re.fullmatch(rf"(exact|drift)-top-p-(0\.\d*[1-9])(?:-({modes}))?", name):
        return truncated(cut[1], cut[2], cut[3] or "") if cut[1] == "drift" or not cut[3] else None
    match = re.fullmatch(rf"stale-([1-9]\d*)(?:-({modes}))?", name)
    return stale(int(match[1]), match[2] or "") if match else None
