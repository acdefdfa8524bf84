"""The arms of an ablation: what may differ between runs of one recipe and one seed."""

import re
from dataclasses import dataclass

CORRECTION_MODES = {  # name in an arm -> what TRL's correction of that mode does with importance ratios beyond the cap
    "token-truncate": "each token weighted by its ratio, at most the cap",
    "token-mask": "tokens with a ratio above the cap left out",
    "sequence-truncate": "each completion weighted by its ratio, at most the cap",
    "sequence-mask": "completions with a ratio above the cap left out",
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
IMPOSSIBLE_ARMS = {"fp16": "float16 on both sides: not possible, dtype has bfloat16 and float32 only"}
"""Arms that users know from elsewhere -> why they cannot run here."""


def arm_named(name: str) -> Arm | None:
    """Return the arm of that name, None if there is none; stale-K and stale-K-CORRECTION exist for every K."""
    if found := next((arm for arm in (*DEFAULT_ARMS, GRPO_ARM) if arm.name == name), None):
        return found
    match = re.fullmatch(rf"stale-([1-9]\d*)(?:-({'|'.join(CORRECTION_MODES)}))?", name)
    return stale(int(match[1]), match[2] or "") if match else None
