"""Checks of a well-typed configuration: one function for each kind of mistake, one line for each mistake."""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from rlinvariant import reading, trainer_token
from rlinvariant.arguments import SCRIPT, given_by_user
from rlinvariant.config.named import named_problems
from rlinvariant.config.recipe import Recipe
from rlinvariant.config.tree import Config
from rlinvariant.conflicts import (
    OF_SERVERS,
    adapter_training_conflicts,
    conflicts,
    divisor,
    microbatch_problems,
    ppo_conflicts,
    server_problems,
    sharding_problems,
    spread_problems,
    truncation_problems,
)
from rlinvariant.errors import UserError
from rlinvariant.files import require_writable
from rlinvariant.gradients import gradients_problems
from rlinvariant.hub import hub_problems
from rlinvariant.install import install_hint
from rlinvariant.kernels import choice
from rlinvariant.launch import asks_the_hub, is_sharded, rank
from rlinvariant.model_source import model_problems, source_problems
from rlinvariant.text import shown

LONGEST_RUN = 200  # bytes: a name of a file has at most 255


def check(config: Config, env: Mapping[str, str], recipe: Recipe | None = None, adapters: bool = False) -> list[str]:
    """List what cannot run, one line each: key, value, what is expected, the fix. Looks at no device and changes nothing.

    Args:
        env: environment variables, read for the launcher's processes and for what contradicts `invariance`.
        recipe: the recipe, for what it needs and checks itself.
        adapters: whether `model` may be a PEFT adapter's directory.
    """
    processes, found = _processes(env)
    found += _check_numbers(config)
    found += filter(None, [choice.disagreement(config.attention, env)])
    found += choice.misplaced(config.attention, config.invariance, None)
    found += config.reward_limits.problems()
    found += named_problems("reward", config.reward) + _check_tools(config, recipe)
    found += _check_model(config, recipe, adapters)
    found += _check_batches(config, processes)
    if recipe is not None and recipe.check is not None:
        found += recipe.check(config)
    found += conflicts(config.trainer, config.invariance, env, "trainer.")
    penalty = config.ppo.kl_coef if config.algorithm == "ppo" else 0.0
    found += truncation_problems(config.trainer, config.invariance, config.staleness, penalty, "trainer.", processes)
    found += check_lora(config)
    if is_sharded(env):
        found += sharding_problems(config.trainer, config.invariance, "trainer.")
    found += _check_ppo(config) if config.algorithm == "ppo" else _check_no_ppo(config)
    tokens = config.trainer.tokens_per_microbatch
    found += microbatch_problems(tokens, None, config.trainer, config.invariance, "trainer.")
    layout = (processes, config.invariance, config.staleness, tokens)
    found += gradients_problems(config.trainer, config.gradients, *layout, prefix="trainer.")
    return found + _check_sampler(config, env) + _check_servers(config)


def check_run(config: Config, env: Mapping[str, str]) -> list[str]:
    """Say why the run's directory cannot be used: it is written once.

    Only the main process looks: it may have made the directory before the others get here.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", config.run):
        return [f"run={shown(config.run)}: expected a name of letters, digits, '.', '_' and '-'; it is a directory under runs/"]
    if len(os.fsencode(config.run)) > LONGEST_RUN:
        return [f"run={shown(config.run)}: expected at most {LONGEST_RUN} bytes; choose a shorter name"]
    if config.resume and "run" not in config.sources:
        return ["resume=True: expected run=NAME too, the run to continue"]
    if "run" not in config.sources and env.get("WORLD_SIZE", "1") != env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")):
        return ["run: missing; with several hosts write run=NAME, so that all use one directory"]
    if rank(env) != 0:
        return []
    if config.resume and config.sources["run"] != SCRIPT and (problem := script_problem(config.run_dir)):
        return [problem]
    if not config.resume and os.path.exists(config.run_dir / "config.json"):  # False where it may not be looked at
        return [f"run={config.run}: {config.run_dir} exists; choose another name, or add resume=true to continue it"]
    try:
        require_writable(config.run_dir, f"run={config.run}", "choose another run=NAME", directory=True)
    except UserError as error:
        return [str(error)]
    return []


def script_problem(directory: Path) -> str | None:
    """Say why the command line cannot go on with a run of a script; None of any other run, or of one whose file is damaged."""
    try:
        recipe = reading.read(directory / "config.json")["recipe"]
        script = recipe["value"] if recipe["source"] == SCRIPT else None
    except (UserError, KeyError, TypeError):
        return None
    again = "start that again, with resume=True beside run= of its trainer"
    return None if script is None else f"{directory}: a run of {shown(script)}; {again}"


def _required(config: Config, *rules: tuple[bool, str, str]) -> list[str]:
    """Make a line of each rule (holds, key, what is expected) that does not hold."""
    found = []
    for holds, key, expected in rules:
        if not holds:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, name)
            found.append(f"{key}={shown(value)}: expected {expected}")
    return found


def _processes(env: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return how many processes the launcher started, and a line for each of its variables that is no number."""
    found = [
        f"{name}={shown(env[name])}: expected a whole number, which accelerate or torchrun sets; run `unset {name}`"
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")
        if name in env and not re.fullmatch("[0-9]{1,9}", env[name])
    ]
    return (1 if found else max(1, int(env.get("WORLD_SIZE", "1")))), found


def unreachable(config: Config, adapters: bool = False) -> list[str]:
    """List the models and rows that a checked configuration names and that the hub would have to give, but cannot.

    `adapters` is that of `check`.
    """
    critic = config.ppo.critic if config.algorithm == "ppo" else None
    models = (("model", config.model, adapters), ("ppo.critic", critic, False))
    found = [line for key, name, taken in models if name for line in source_problems(key, name, taken)]
    rows = (
        []
        if config.recipe or not asks_the_hub()
        else [(f"data.{key}", getattr(config.data, key, None)) for key in ("path", "eval_path")]
    )
    return found + [
        line for key, path in rows if path and not os.path.exists(path) for line in hub_problems(key, path, "dataset")
    ]


def _check_numbers(config: Config) -> list[str]:
    return _required(
        config,
        (config.steps >= 1, "steps", "at least 1"),
        (0 <= config.seed < 2**32, "seed", "0 to 4294967295"),
        (config.staleness >= 0, "staleness", "0 or more optimizer steps"),
        (config.save_minutes is None or config.save_minutes >= 0, "save_minutes", "0 or more minutes, or None"),
        (config.completions_gib is None or config.completions_gib >= 0, "completions_gib", "0 or more GiB, or None"),
    )


def _check_sampler(config: Config, env: Mapping[str, str]) -> list[str]:
    """Check the sampler's sizes, how they go with the trainer's, and that W&B is asked for in one place."""
    trainer, sampler = config.trainer, config.sampler
    length, longest = trainer.max_completion_length, sampler.max_model_len
    room = f"more than trainer.max_completion_length={length}, to leave room for the prompt"
    started, spread = env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")), sampler.tensor_parallel_size
    processes = max(1, int(started)) if re.fullmatch("[0-9]{1,9}", started) else 1
    others, batched = spread_problems(spread, config.invariance), sampler.max_num_batched_tokens
    reports = trainer.report_to if isinstance(trainer.report_to, list) else [trainer.report_to]
    return others + _required(
        config,
        (length is not None and length >= 1, "trainer.max_completion_length", "at least 1"),
        (longest is None or length is None or longest > length, "sampler.max_model_len", room),
        (sampler.max_num_seqs >= 1, "sampler.max_num_seqs", "at least 1"),
        (
            batched is None or batched >= sampler.max_num_seqs,
            "sampler.max_num_batched_tokens",
            f"at least sampler.max_num_seqs={sampler.max_num_seqs}",
        ),
        (sampler.kv_cache_gib is None or sampler.kv_cache_gib > 0, "sampler.kv_cache_gib", "more than 0"),
        (spread >= 1 and processes % spread == 0, "sampler.tensor_parallel_size", divisor(processes)),
        (not {"wandb", "all"} & set(reports), "trainer.report_to", "no wandb or all: W&B is set by wandb.mode="),
    )


def _check_servers(config: Config) -> list[str]:
    """Check where the sampler's servers are, and that no other setting speaks of an engine that the trainer does not have."""
    sampler = config.sampler
    given = [key.partition(".") for key, source in config.sources.items() if given_by_user(source)]
    names = [name for section, _, name in given if section == "sampler" and name not in OF_SERVERS]
    others = [f"sampler.{name}={shown(getattr(sampler, name))}" for name in names]
    found = server_problems(sampler.servers, sampler.trainer_token_file, config.invariance, others)
    if sampler.servers and sampler.trainer_token_file is not None:
        try:
            trainer_token.read(sampler.trainer_token_file, "sampler.trainer_token_file=")
        except UserError as error:
            found.append(str(error))
    return found


def _check_ppo(config: Config) -> list[str]:
    ppo, found = config.ppo, ppo_conflicts(config.trainer, config.ppo, "trainer.")
    if (first := ppo.value_warmup_steps) >= config.steps > 0:
        least = f"less than steps={config.steps}, or the policy learns nothing"
        found.append(f"ppo.value_warmup_steps={first}: expected {least}")
    return found + ([] if ppo.critic is None else model_problems("ppo.critic", ppo.critic))


def _check_no_ppo(config: Config) -> list[str]:
    """Refuse settings of PPO where they would do nothing; those of a recipe for PPO rest when the user asks for GRPO."""
    rest = given_by_user(config.sources.get("algorithm", "default"))
    return [
        f"{key}={shown(getattr(config.ppo, key.removeprefix('ppo.')))}: expected algorithm=ppo, or it does nothing; remove it"
        for key, source in config.sources.items()
        if key.startswith("ppo.") and (given_by_user(source) or not rest)
    ]


def check_lora(config: Config) -> list[str]:
    """Refuse adapters where they cannot be exact or cannot be made, and settings of adapters where there are none."""
    lora = config.lora
    if not lora.r:
        keys = [key for key in config.sources if key.startswith("lora.") and key != "lora.r"]
        does_nothing = "expected lora.r=RANK too, or it does nothing; remove it"
        return [f"{key}={shown(getattr(lora, key.removeprefix('lora.')))}: {does_nothing}" for key in keys]
    found = _required(
        config,
        (lora.r >= 1, "lora.r", "a rank, at least 1, or 0 for no adapters"),
        (lora.alpha is None or lora.alpha >= 1, "lora.alpha", "at least 1, or None for 2 r"),
        (bool(lora.target_modules), "lora.target_modules", "names of projections, or all-linear"),
    )
    strange = [x for x in lora.target_modules if not re.fullmatch(r"[\w.-]+", x)]
    if strange and (len(lora.target_modules) > 1 or not is_regular_expression(strange[0])):
        said = f"lora.target_modules={shown(','.join(lora.target_modules))}"
        found.append(f"{said}: expected names of projections, all-linear, or one regular expression without commas")
    if importlib.util.find_spec("peft") is None:
        found.append(f"lora.r={lora.r}: needs the package peft; {install_hint('lora')}")
    critic = config.ppo.critic if config.algorithm == "ppo" else None
    said = (f"lora.r={lora.r}", "0", config.invariance, config.trainer, critic)
    return found + adapter_training_conflicts(*said, prefix="trainer.")


def is_regular_expression(text: str) -> bool:
    """Say whether a text can be matched with."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check_batches(config: Config, processes: int) -> list[str]:
    """Refuse batch sizes that TRL would refuse later, when everything is loaded."""
    trainer, found = config.trainer, []
    group, per_device = trainer.num_generations, trainer.per_device_train_batch_size
    sizes = {
        "num_generations": (group, 1 if config.algorithm == "ppo" else 2),
        "num_iterations": (trainer.num_iterations, 1),
        "per_device_train_batch_size": (per_device, 1),
        "gradient_accumulation_steps": (trainer.gradient_accumulation_steps, 1),
    }
    for key, (value, least) in sizes.items():
        if value is None or value < least:
            reason = ": a group of one has no advantage" if key == "num_generations" else ""
            found.append(f"trainer.{key}={value}: expected at least {least}{reason}")
    if trainer.auto_find_batch_size:
        found.append("trainer.auto_find_batch_size=True: expected False; lower trainer.per_device_train_batch_size")
    if found or group is None:
        return found
    if trainer.generation_batch_size is not None and trainer.steps_per_generation is not None:
        a, b = trainer.generation_batch_size, trainer.steps_per_generation
        keys = f"trainer.generation_batch_size={a} and trainer.steps_per_generation={b}"
        return [f"{keys}: both set the size of a rollout; keep one"]
    global_batch = per_device * processes
    samples = trainer.generation_batch_size
    if samples is None:
        samples = global_batch * (trainer.steps_per_generation or trainer.gradient_accumulation_steps)
    elif samples % global_batch:
        fix = f"a multiple of trainer.per_device_train_batch_size x processes = {per_device} x {processes}"
        return [f"trainer.generation_batch_size={samples}: expected {fix}"]
    if samples < 2 and group == 1:
        return [f"trainer.per_device_train_batch_size={per_device}: expected a rollout of at least 2 samples; raise it"]
    if samples % group:
        shares = f"trainer.per_device_train_batch_size={per_device}, {processes} process(es)"
        made = f"the {samples} samples of a rollout ({shares})"
        return [f"trainer.num_generations={group}: expected a divisor of {made}; change one of them"]
    return []


def _check_model(config: Config, recipe: Recipe | None, adapters: bool) -> list[str]:
    """Require that the model named is there and whole; a hub id is looked up later."""
    if config.model is not None:
        return model_problems("model", config.model, adapters)
    if recipe is None or recipe.prepare_model:
        return []
    why = f"recipe {recipe.name} has none of its own" if config.recipe else "no recipe gives one"
    return [f"model: missing, {why}; write model=DIRECTORY or model=ORG/NAME"]


def _check_tools(config: Config, recipe: Recipe | None) -> list[str]:
    """Check what the user names as tools and as environment, and how they are called."""
    found = named_problems("tools", config.tools) + config.tool_limits.problems()
    found += [] if config.environment is None else named_problems("environment", [config.environment])
    own = recipe is not None and (recipe.tools is not None or recipe.environment is not None)
    if not (own or config.tools or config.environment):
        keys = [key for key in config.sources if key.startswith("tool_") or key == "trainer.max_tool_calling_iterations"]
        needed = "tools= or environment= beside it, or it does nothing; remove it"
        found += [f"{key}: expected {needed}" for key in keys]
    environment = config.environment or (recipe is not None and recipe.environment is not None)
    if environment and config.reward_cage:
        found.append(
            f"reward_cage={config.reward_cage}: expected 0 with an environment, whose state is in the trainer's process"
        )
    return found
