"""Refuse before any run of an ablation starts what that run would refuse."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from rlinvariant.ablate.arms import GRPO_ARM, MERGED_ARM
from rlinvariant.ablate.plan import Plan
from rlinvariant.ablate.runs import visible_gpus
from rlinvariant.config import Config, parse, unreachable
from rlinvariant.conflicts import SIDES
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.resumption import ADDED


def checked(plan: Plan) -> dict[str, Config]:
    """Return the configuration of each arm by name. Raises ConfigErrors with what a run would refuse, each line once."""
    environment: dict[str, str] = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    if plan.launch is not None:
        processes = re.search(r"^num_processes: *(\d+)", Path(plan.launch).read_text(), re.M)
        if processes is None:
            raise UserError(f"launch={plan.launch}: has no num_processes; give an accelerate configuration")
        environment |= {"WORLD_SIZE": processes[1], "LOCAL_WORLD_SIZE": processes[1]}
    configs, found = {}, dict[str, list[str]]()
    for arm in plan.arms:
        arguments = [a for a in plan.arguments(arm, plan.seeds[0]) if not a.startswith("run=")]
        try:
            config = configs[arm.name] = parse([*arguments, f"run=ablation-{plan.name}/{arm.name}/check"], environment)
            lines = []
            if config.staleness >= config.steps:
                lines = [f"steps={config.steps}: expected more than the lag of arm {arm.name}; raise steps, or choose arms="]
            if arm == MERGED_ARM and not config.lora.r:
                lines = [f"arms={arm.name}: recipe={plan.recipe} trains no adapters; add lora.r=16, or use recipe=words_lora"]
            if arm == GRPO_ARM and config.load_recipe().defaults.get("algorithm") != "ppo":
                lines = [f"arms={arm.name}: recipe={plan.recipe} is a GRPO recipe, for which this is arm exact; leave it out"]
        except ConfigErrors as error:
            lines = error.errors
        for line in lines:
            found.setdefault(line, []).append(arm.name)
    used = {argument for arm in plan.arms for argument in plan.arguments(arm, plan.seeds[0])}
    for unused in [setting for setting in plan.settings if setting not in used]:
        line = f"{unused}: of no arm here, as each has stock kernels where it is for; leave it out, or add arms=exact"
        found[line] = [arm.name for arm in plan.arms]
    if found:
        everywhere = len(plan.arms)
        raise ConfigErrors([a if len(b) == everywhere else f"{a} (arm {', '.join(b)})" for a, b in found.items()])
    if problems := unreachable(configs[plan.arms[0].name]):  # the arms train one model on one data set
        raise ConfigErrors(problems)
    return configs


def refuse_crowds(plan: Plan, configs: Mapping[str, Config]) -> None:
    """Raise UserError where several runs at once would each depend on what the others have taken."""
    if plan.at_once == 1:
        return
    gpus, said = len(visible_gpus()), f"at_once={plan.at_once}"
    if not gpus:
        raise UserError(f"{said}: expected 1 without a GPU, where each run takes all cores; leave it out")
    own = [config for config in configs.values() if SIDES[config.invariance][1]]
    if plan.at_once > gpus and any(config.trainer.tokens_per_microbatch is None for config in own):
        why = "runs that share one would divide a step by what memory the others left"
        fix = f"set trainer.tokens_per_microbatch=16384, say, or at_once={gpus}"
        raise UserError(f"{said}: expected at most {gpus}, the number of GPUs: {why}; {fix}")


def refuse_mixed(plan: Plan, configs: Mapping[str, Config]) -> None:
    """Raise UserError unless every run that is there was made with the settings of now."""
    for arm, seed in plan.jobs():
        run = plan.run_dir(arm, seed)
        if not run.config.exists():
            continue
        added = {key: {"value": value} for key, value in ADDED.items()}
        then, now = {**added, **run.read_config()}, configs[arm.name].resolved()
        for key in now.keys() & then.keys() - {"run", "resume", "seed"}:
            if not key.startswith("wandb.") and then[key]["value"] != now[key]["value"]:
                raise UserError(
                    f"run={plan.name}: {run.path} was run with {key}={then[key]['value']}, and now it is {now[key]['value']}; "
                    "an ablation has one setting for all: add run=NAME for a new one"
                )
