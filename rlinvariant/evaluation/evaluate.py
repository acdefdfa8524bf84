"""Draw, grade and count: the work of `rlinvariant eval`, when its settings are known to be right."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlinvariant.config import Config
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.evaluation.estimate import doubling, estimate, pass_at_k
from rlinvariant.kernels import choice
from rlinvariant.model_source import base_and_adapter, load_tokenizer, tokenizer_of
from rlinvariant.report.console import Console
from rlinvariant.rollout import Truncation
from rlinvariant.run import sampler_options
from rlinvariant.sampler.engine import Sampler
from rlinvariant.sampler.refusals import load_config
from rlinvariant.support import allow_unproven, device_problems
from rlinvariant.text import plural, shown
from rlinvariant.tools.plain import plain_tools
from rlinvariant.trainer.player import Player
from rlinvariant.trainer.preflight import Start, Tooling, check_data, load_generation
from rlinvariant.trainer.samples import or_none
from rlinvariant.types import JsonObject

MIXED = "no pass@k: rewards are not all 0 or 1; --pass R says from which reward on a completion passes"


def evaluate(
    config: Config, samples: int, temperature: float, ks: Sequence[int] | None, least: float | None, console: Console
) -> JsonObject:
    """Draw from `config.model`, and grade, completions of the held-out rows.

    Args:
        config: settings that were checked.
        samples: completions of each problem at `temperature`, beside the greedy one; 0: the greedy one alone.
        temperature: of the samples.
        ks: which pass@k; None: 1, 2, 4, ..., samples.
        least: weighted reward from which on a completion passes, rounded to fp32; None: 1, where every reward is 0 or 1.
        console: where it says what it does.

    Returns:
        What the JSON file holds: settings, for each way of drawing its estimates, and each problem with its completions.

    Raises:
        ConfigErrors, UserError: model, rows or rewards cannot be used; a reward function failed.
    """
    import torch

    assert config.model is not None, "the subject of an evaluation is its model"
    args = config.grpo_config()
    truncation = Truncation.of(config.trainer)
    allow_unproven(config.unproven_gpu)
    choice.choose(config.attention)
    problems = device_problems(args, config.invariance, getattr(torch, config.dtype))
    if problems:
        raise ConfigErrors(problems)
    model, adapter = base_and_adapter(config.model)
    model_config, recipe = load_config(model), config.load_recipe()
    tokenizer = load_tokenizer(tokenizer_of(model, adapter), model_config)
    tooling = Tooling.asked(config)
    if tooling and config.tool_format == "plain":
        tokenizer = plain_tools(tokenizer)
    held_out = recipe.datasets(config, tokenizer)[1]
    if held_out is None:
        raise UserError(_none_held_out(config))
    rewards = config.reward_funcs()
    generation = load_generation(model, model_config)
    parts = (args, model, model_config, generation, tokenizer, rewards, None, held_out, config.sampler.max_model_len)
    check_data(Start(*parts, prefix="trainer.", tooling=tooling))
    rows = held_out.to_list()
    how = {"invariant": config.invariance == "exact", "dtype": config.dtype, **sampler_options(config)}
    with console.stage("starting the vLLM engine"):
        engine = lambda: Sampler(adapter or model, **how)  # noqa: E731
        player = Player(args, tokenizer, generation, rewards, config.reward_limits, tooling, held_out, engine)
    draws, per_problem, notes = [], [{"prompt": row["prompt"], "columns": _columns(row)} for row in rows], []
    ways = [("greedy", 1, 0.0)] + ([(f"T={temperature:g}", samples, temperature)] if samples else [])
    for name, count, heat in ways:
        repeated = [i for i in range(len(rows)) for _ in range(count)]
        with console.stage(f"{name}: {len(rows):,} problems x {count}"):
            played = player.play([rows[i] for i in repeated], heat, count, truncation)
        for i, seen in zip(repeated, played, strict=True):
            per_problem[i].setdefault(name, []).append(seen)
        found, said = estimates([problem[name] for problem in per_problem], ks if heat else [1], least, bool(heat))
        seen = [one for problem in per_problem for one in problem[name]]
        if left := sum(one["reward"] is None for one in seen):
            said.append(f"{name}: {left:,} of {plural(len(seen), 'completion')} left out: no reward applies")
        notes += [line for line in said if line not in notes]
        lengths, cuts = [one["length"] for one in seen], [one["cut"] for one in seen]
        sizes = {
            "completions": len(seen),
            "mean_length": sum(lengths) / len(seen),
            "left_out": left,
            "cut": sum(cuts) / len(seen),
        }
        draws.append({"name": name, "temperature": heat, "samples": count, "estimates": found, **sizes})
    player.sampler.close()
    settings = {key: entry["value"] for key, entry in config.resolved().items()}
    about = {"problems": len(rows), "invariance": config.invariance, "seed": config.seed, "settings": settings}
    return {**about, "draws": draws, "notes": notes, "results": per_problem}


def _none_held_out(config: Config) -> str:
    """Say that there is nothing to evaluate on, and what gives it."""
    if config.recipe:
        return f"recipe={config.recipe}: has no held-out rows to evaluate on; its datasets() returns None for them"
    path = shown(str(getattr(config.data, "path", None)))
    return f"data.path={path}: no held-out rows to evaluate on; write data.eval_size=N, data.eval_path= or data.eval_split="


def estimates(
    problems: Sequence[Sequence[JsonObject]], ks: Sequence[int] | None, least: float | None, sampled: bool
) -> tuple[JsonObject, list[str]]:
    """Return the mean reward and pass@k over problems, each with its standard error, and what is to be said of them.

    As in training, a completion to which no reward applies, whose reward is None, is left out of both; so is a problem that has
    no other, and of pass@k one with fewer than k. Rewards are fp32, and so is `least`: a reward of 0.9 passes where 0.9 does.
    Greedy completions have their pass@1 where `least` is given: it is not their mean.
    """
    rewards = [[one["reward"] for one in problem if one["reward"] is not None] for problem in problems]
    rewards = [of_one for of_one in rewards if of_one]
    found = {"reward": _as_json([sum(r) / len(r) for r in rewards])}
    if least is None and any(r not in (0.0, 1.0) for problem in rewards for r in problem):
        return found, [MIXED]
    if sampled or least is not None:
        bound = 1.0 if least is None else float(np.float32(least))
        for k in ks or doubling(len(problems[0])):
            of_k = [(len(of_one), sum(r >= bound for r in of_one)) for of_one in rewards if len(of_one) >= k]
            found[f"pass@{k}"] = _as_json([pass_at_k(drawn, passed, k) for drawn, passed in of_k])
    return found, []


def _as_json(values: Sequence[float]) -> dict[str, float | None]:
    mean, error = estimate(values) if values else (math.nan, math.nan)
    return {"mean": or_none(mean), "error": or_none(error), "problems": len(values)}


def _columns(row: dict[str, Any]) -> dict[str, str]:
    """Return what else a row has, as text: an answer, a level."""
    return {key: str(value) for key, value in row.items() if key != "prompt"}
