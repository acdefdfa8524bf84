"""Look once, before weights are loaded and the engine starts, at what can be known, and say it in one list."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlinvariant.errors import ConfigErrors
from rlinvariant.rewards import reward_problems
from rlinvariant.trainer.preflight.disk import disk_problems
from rlinvariant.trainer.preflight.parts import (
    constructing,
    evaluation_problems,
    hub_problems,
    part_problems,
    weight_problems,
)
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import dataset_problems, row_problems
from rlinvariant.trainer.preflight.signatures import needed_columns, signature_problems
from rlinvariant.trainer.preflight.tokens import (
    end_tokens,
    generation_problems,
    load_generation,
    token_problems,
)
from rlinvariant.trainer.preflight.tools import Tooling, call_limit_problems, routing_problems, tooling_problems
from rlinvariant.trainer.published import place_problems

__all__ = ["Start", "Tooling", "check_data", "check_start", "constructing", "end_tokens", "load_generation"]


@dataclass(frozen=True)
class Start:
    """Holds what a run, or an evaluation, is going to be made of, as far as it is there before weights are loaded.

    Args:
        args: TRL's configuration.
        name: directory or hub id of the model.
        config, generation: the model's configuration and generation settings.
        tokenizer: the run's.
        rewards: reward functions, models or names, one or a list.
        train, evaluation: the data sets, the second perhaps a dict of several by name; None: there is none.
        max_model_len: most tokens of a prompt and its completion that the engine takes; None: the model's positions.
        models: how many models are trained: 2 for PPO, whose critic is one.
        adapter: the `peft.LoraConfig` of the adapters that are trained in place of whole models; None: there are none.
        prefix: what the user writes before the name of a field of `args`.
        published: the directory that gets the trained model; None: the run itself publishes none.
        tokens_per_microbatch: most tokens of a prompt and its completion that a backward takes; None: no such limit.
        tooling: tools and environments.
    """

    args: Any
    name: str
    config: Any
    generation: Any
    tokenizer: Any
    rewards: Any
    train: Any
    evaluation: Any = None
    max_model_len: int | None = None
    models: int = 1
    adapter: Any = None
    prefix: str = ""
    published: Path | None = None
    tokens_per_microbatch: int | None = None
    tooling: Tooling = field(default_factory=Tooling)

    @property
    def vocabulary(self) -> int | None:
        """Return the rows of the model's embedding, or None where the configuration does not say."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    @property
    def prompts(self) -> Prompts:
        """Return how the run's prompts become tokens."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        limit = "the model's positions" if self.max_model_len is None else "the sampler's max_model_len"
        if self.max_model_len is not None and self.prefix:
            limit = "sampler.max_model_len"
        longest = self.max_model_len or positions
        if self.tokens_per_microbatch is not None and (longest is None or self.tokens_per_microbatch < longest):
            longest, limit = self.tokens_per_microbatch, f"{self.prefix}tokens_per_microbatch"
        return Prompts(
            self.tokenizer,
            self.vocabulary,
            longest,
            self.args.max_completion_length or 0,
            self.args.chat_template_kwargs or {},
            limit,
            self.prefix,
            self.tooling.schemas() if self.tooling else None,
        )


def check_start(start: Start) -> list[str]:
    """Look at every row and every part once.

    Returns:
        What the user should know, one line each.

    Raises:
        ConfigErrors: everything that has to be mended, one line each.
    """
    args, prefix = start.args, start.prefix
    problems = part_problems(args, prefix) + hub_problems(args, prefix)
    if start.published is not None:
        problems += place_problems(start.published, start.name)
    problems += generation_problems(start.name, start.generation)
    problems += disk_problems(args, start.config, start.models, prefix, start.adapter)
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if start.evaluation is None:
        asked = (("eval_strategy", strategy, "no"), ("eval_on_start", args.eval_on_start, False))
        why = "as there is no evaluation data set; or give one"
        problems += [f"{prefix}{key}={value}: expected {none}, {why}" for key, value, none in asked if value != none]
    elif args.eval_on_start or strategy != "no":
        problems += evaluation_problems(args, prefix)
    if isinstance(start.evaluation, dict) and (metric := args.metric_for_best_model) is not None:
        names = [f"eval_{name}_" for name in start.evaluation]
        if not f"eval_{metric.removeprefix('eval_')}".startswith(tuple(names)):
            of = " or ".join(f"{name}reward" for name in names)
            problems.append(f"{prefix}metric_for_best_model={metric}: expected that of one evaluation data set, as {of}")
    return check_data(start, problems)


def check_data(start: Start, problems: Sequence[str] = ()) -> list[str]:
    """Look at rewards, tokenizer and every row once, as `check_start` does; `problems` are what is known already."""
    args, prefix = start.args, start.prefix
    rows = start.train if start.train is not None else start.evaluation
    wrong = tooling_problems(start.tooling, start.tokenizer, rows, start.rewards)
    wrong += call_limit_problems(start.tooling, args.max_tool_calling_iterations, prefix)
    problems = [*problems, *wrong, *reward_problems(start.rewards), *weight_problems(args, start.rewards, prefix)]
    problems += token_problems(start.tokenizer, start.vocabulary, start.name)
    start = replace(start, tooling=Tooling()) if wrong else start  # then rows are read without them
    of_a_rollout = args.generation_batch_size // (args.num_generations or 1)
    notes: list[str] = []
    held_out = start.evaluation if isinstance(start.evaluation, dict) else {"": start.evaluation}
    sets = [("train", start.train, of_a_rollout), *((f"eval {key}".strip(), rows, 1) for key, rows in held_out.items())]
    for name, dataset, least in sets:
        if dataset is None:
            continue
        if wrong := dataset_problems(dataset, name, least, prefix):
            problems += wrong
            continue
        problems += routing_problems(start.tooling, dataset, name)
        columns = ["prompt"] if args.remove_unused_columns else dataset.column_names
        given = columns if start.tooling.environment is None else [*columns, "environments"]
        problems += signature_problems(start.rewards, given, name)
        needed = [column for column in needed_columns(start.rewards) if column in columns]
        wrong, said = row_problems(dataset, name, start.prompts, needed)
        problems, notes = problems + wrong, notes + said
    if problems:
        raise ConfigErrors(problems)
    return notes
