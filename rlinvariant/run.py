"""One run, from a configuration to a trained model and its proof. Read this file to see how the parts fit together."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rlinvariant import runtime
from rlinvariant.cache import CACHE
from rlinvariant.checkpoints import FREE_SPACE, Checkpoint
from rlinvariant.config import Config
from rlinvariant.config.recipe import Recipe
from rlinvariant.conflicts import OF_SERVERS
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import disk_errors
from rlinvariant.journal import Journal, nothing_left
from rlinvariant.kernels import choice
from rlinvariant.launch import is_sharded, largest, on_main_process, rank
from rlinvariant.lock import locked
from rlinvariant.model_source import load_tokenizer, local_model
from rlinvariant.plan import TrainerPlan, build_trainer, plan_trainer
from rlinvariant.publish import card_facts, publish
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir
from rlinvariant.resumption import Resumption, dataset_digest, find, require_same_data
from rlinvariant.stopping import after_a_step
from rlinvariant.tools.plain import plain_tools
from rlinvariant.warmstart import save_here

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.grpo_config import GRPOConfig

    from rlinvariant.trainer.grpo import InvariantGRPOTrainer
    from rlinvariant.trainer.interface import SamplerOptions
    from rlinvariant.trainer.preflight import Start, Tooling


@dataclass(frozen=True)
class Plan:
    """Describes a run that can start: whatever speaks against it was refused when the plan was made."""

    config: Config
    args: "GRPOConfig"
    tokenizer: "PreTrainedTokenizerBase"
    rewards: list[Any]
    tooling: "Tooling"
    train_dataset: "Dataset"
    eval_dataset: "Dataset | None"
    trainer: TrainerPlan
    console: Console
    journal: Journal
    resumption: Resumption


def run(config: Config) -> None:
    """Train as `config` says, and leave a result and a report in every outcome; a start that fails leaves nothing.

    Raises:
        UserError: something that the user can mend, at the start or in the middle.
        ParityError: the two sides are not one function, or a token that was trained on was not compared.
    """
    with directory(config):
        planned = plan(config)
        trainer = build(planned)
        carry_out(planned.journal, trainer, planned.eval_dataset, lambda: train(planned, trainer))


@contextmanager
def directory(config: Config) -> Iterator[None]:
    """Hold the run's directory while a block runs; a start that fails leaves none behind."""
    lock = locked(config.run_dir, "run") if rank() == 0 else nullcontext()
    with disk_errors(config.run_dir, FREE_SPACE), nothing_left(config.run_dir / "checkpoints"), lock:
        yield


def carry_out(
    journal: Journal,
    trainer: "InvariantGRPOTrainer",
    eval_dataset: "Dataset | None",
    train: Callable[[], int],
    may_end_early: bool = False,
) -> None:
    """Train between two evaluations, and write all of it into the journal.

    Args:
        train: trains, and returns the last step.
        may_end_early: whether a callback may end the run before its last step.
    """
    trainer.model_directory = journal.directory.model
    rows: Any = trainer.train_dataset
    trainer.about_run = lambda: card_facts(
        journal.config, rows, eval_dataset, {when: value.reward for when, value in journal.held_out.items()}
    )
    journal.start(trainer)
    with journal.finishing():
        evaluate(journal, trainer, eval_dataset, "before")
        with after_a_step(largest):
            done = train()
        if done < (steps := journal.config.steps) and not may_end_early:
            raise UserError(f"steps={steps}: training ended after {done:,}: is a callback ending it? lower steps")
        evaluate(journal, trainer, eval_dataset, "after")
        publish(journal.config, trainer, journal.console)


def plan(config: Config) -> Plan:
    """Decide what is to be run, and refuse what cannot be. Makes the recipe's model where it is not there yet.

    `config.parse` has refused what the command line alone shows; here follow device, model, tokenizer and data.
    """
    runtime.configure()
    with runtime.importing():
        args = config.grpo_config()  # imports TRL, and starts the process group, if there is one
        import torch
        from transformers.utils import logging as transformers_logging

        from rlinvariant.support import allow_unproven, device_problems

    console, recipe = Console(args.process_index == 0), config.load_recipe()
    allow_unproven(config.unproven_gpu)
    choice.choose(config.attention)
    problems = device_problems(args, config.invariance, getattr(torch, config.dtype))
    if problems:  # before a recipe makes its model
        raise ConfigErrors(problems)
    trained = config.recipe or config.data.path
    console.print(f"{trained}: invariance={config.invariance}, {config.steps} steps, files in {config.run_dir}")
    resumption = on_main_process(lambda: find(config))
    for line in resumption.lines:
        console.print(line)
    if resumption.checkpoint is not None:
        resumption.checkpoint.require_layout(args.world_size, is_sharded())
    if config.staleness:
        lag = f"staleness={config.staleness}: the sampler's weights lag by as many steps"
        console.print(f"{lag}; log-probs of two versions are counted, not required to be equal")
    runtime.quiet()
    transformers_logging.disable_progress_bar()  # of a model that a recipe saves too
    with console.stage("loading transformers, TRL and vLLM"), runtime.importing():
        from rlinvariant.sampler import engine  # noqa: F401
        from rlinvariant.trainer.preflight import check_start
    rows = None
    if (model := config.model) is None:
        assert recipe.prepare_model is not None, "config.check has refused a run without a model"
        if recipe.untrained is not None:
            with saved_untrained(config, recipe) as model:
                check_start((first := looked_at(config, args, recipe, model)).start)
                rows = first.start.train, first.start.evaluation
        model = recipe.prepare_model(config)
    model = local_model(model)
    seen = looked_at(config, args, recipe, model, rows)
    for note in check_start(seen.start):
        console.print(f"note: {note}")
    data, start = dataset_digest(seen.start.train), seen.start
    resumption = require_same_data(resumption, data, config)
    journal = Journal(config, model, sampler_options(config), console, args.process_index == 0, data, resumption)
    parts = (start.tokenizer, start.rewards, start.tooling, start.train, start.evaluation, seen.trainer)
    return Plan(config, args, *parts, console, journal, resumption)


class Seen(NamedTuple):
    """Holds what was decided of a trainer by the configuration of its model, and what is looked at next."""

    trainer: TrainerPlan
    start: "Start"


def looked_at(
    config: Config,
    args: "GRPOConfig",
    recipe: Recipe,
    model: str,
    rows: "tuple[Dataset, Dataset | None] | None" = None,
) -> Seen:
    """Plan a trainer of the model in a directory or on the hub, and load its tokenizer and the rows. No weights are loaded.

    Args:
        rows: the training and held-out ones, where they are there; None: the recipe makes them.

    Raises:
        ConfigErrors, UserError: as `plan_trainer`; a tokenizer or rows that cannot be loaded.
    """
    from rlinvariant.trainer.preflight import Tooling

    ppo = config.ppo if config.algorithm == "ppo" else None
    engine = served(config) or sampler_options(config)
    how = (config.invariance, config.dtype, model, engine, config.save_dtype, config.lora.peft_config())
    trainer = plan_trainer(model, args, ppo, *how)
    tooling = Tooling.asked(config)
    tokenizer = load_tokenizer(model, trainer.config)
    if tooling and config.tool_format == "plain":
        tokenizer = plain_tools(tokenizer)
    train, evaluation = recipe.datasets(config, tokenizer) if rows is None else rows
    published, tokens = RunDir(config.run_dir).model, config.trainer.tokens_per_microbatch
    parts = (tokenizer, config.reward_funcs(), train, evaluation, tooling)
    return Seen(trainer, trainer.start(*parts, published=published, tokens_per_microbatch=tokens, prefix="trainer."))


@contextmanager
def saved_untrained(config: Config, recipe: Recipe) -> Iterator[str]:
    """Save a recipe's model before its first training, for a block that looks at it; what the block refuses names the recipe.

    Raises:
        ConfigErrors, UserError: as the block does, with the recipe in place of the directory.
    """
    import torch

    assert recipe.untrained is not None
    with tempfile.TemporaryDirectory() as directory:
        of_recipe = f"recipe={config.recipe}"

        def named(line: str) -> str:
            line = line.replace(f"model={directory}", f"{of_recipe}, whose own model it trains")
            return line.replace(directory, f"the model that {of_recipe} makes in {CACHE}")

        with torch.random.fork_rng(devices=[]):
            model, tokenizer = recipe.untrained(config)
        save_here(model, directory)
        tokenizer.save_pretrained(directory)
        try:
            yield directory
        except ConfigErrors as error:
            raise ConfigErrors([named(line) for line in error.errors]) from error
        except UserError as error:
            raise UserError(named(str(error)), agreed=error.agreed) from error


def build(planned: Plan) -> "InvariantGRPOTrainer":
    """Load the weights, start the engine, and make the trainer, which writes to the journal."""
    config, journal = planned.config, planned.journal
    with planned.console.stage("starting the vLLM engine and checking the model"):
        trainer = build_trainer(
            planned.trainer,
            planned.rewards,
            planned.train_dataset,
            eval_dataset=planned.eval_dataset,
            processing_class=planned.tokenizer,
            staleness=config.staleness,
            gradients=config.gradients,
            tokens_per_microbatch=config.trainer.tokens_per_microbatch,
            recompute=config.recompute,
            peft_config=config.lora.peft_config(),
            tools=list(planned.tooling.tools) or None,
            environment_factory=planned.tooling.environment,
            **asdict(config.reward_limits),
            **asdict(config.tool_limits),
            on_row=journal.on_row,
            on_evaluation=journal.on_evaluation,
            on_samples=journal.on_samples,
            on_rollout=journal.on_rollout,
        )
    trainer.on_save, trainer.save_minutes = journal.on_save, config.save_minutes
    return trainer


def train(planned: Plan, trainer: "InvariantGRPOTrainer") -> int:
    """Train from where the run stands, and return the last step."""
    go_on = lambda checkpoint: trainer.train(resume_from_checkpoint=checkpoint)  # noqa: E731
    return train_on(trainer, planned.resumption.checkpoint, planned.config.steps, planned.console, go_on)


def train_on(
    trainer: "InvariantGRPOTrainer",
    checkpoint: Checkpoint | None,
    steps: int,
    console: Console,
    train: Callable[[Checkpoint | None], object],
) -> int:
    """Call `train` with the checkpoint that a run goes on from, and return the last step.

    A run that has done all its steps only gets its last weights back: transformers looks at their number after a step.
    """
    if checkpoint is not None and checkpoint.step >= steps:
        console.print(f"all {checkpoint.step} steps are done: nothing is trained")
        trainer.take_weights(checkpoint)
    else:
        train(checkpoint)
    return trainer.state.global_step


def evaluate(journal: Journal, trainer: "InvariantGRPOTrainer", dataset: "Dataset | None", when: str) -> None:
    """Put the mean reward of one greedy completion per held-out row into the journal, `when` being before or after."""
    if dataset is None or when in journal.held_out:
        return
    from rlinvariant.trainer.evaluate import greedy_reward

    with journal.console.stage(f"held-out reward {when}, greedy, {len(dataset)} prompts"):
        value = greedy_reward(trainer, dataset)
    journal.on_held_out(when, value, trainer.state.global_step)
    journal.console.print(f"held-out reward {when}: {value.reward:.3f}")
    if math.isnan(value.reward):
        none = f"no reward function gave any of {len(dataset):,} completions a number"
        journal.console.print(f"note: held-out reward {when}: every reward is None: {none}; return some, or change the rows")


def sampler_options(config: Config) -> "SamplerOptions":
    """Return what a configuration says of the engine, as `Sampler` takes it."""
    settings = config.sampler
    options: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        "enable_prefix_caching": settings.enable_prefix_caching,
    }
    if settings.enforce_eager is not None:
        options["enforce_eager"] = settings.enforce_eager
    if settings.max_num_batched_tokens is not None:
        options["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if settings.tensor_parallel_size > 1:
        options["tensor_parallel_size"] = settings.tensor_parallel_size
    return {"max_model_len": settings.max_model_len, "kv_cache_gib": settings.kv_cache_gib, "options": options}


def served(config: Config) -> "SamplerOptions":
    """Return what a configuration says of servers, in place of an engine; nothing where it names none."""
    found: Any = {name: getattr(config.sampler, name) for name in OF_SERVERS}
    return found if config.sampler.servers else {}
