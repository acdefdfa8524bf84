"""A script's run: the configuration that a run of the command line would have, from a TRL script's arguments."""

from __future__ import annotations

import atexit
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
import datasets
from transformers.trainer_utils import TrainOutput

from rlinvariant import stopping
from rlinvariant.arguments import SCRIPT
from rlinvariant.config import Config, Data, LoraConfig, PPOConfig, SamplerConfig, WandbConfig
from rlinvariant.config.check import check_run
from rlinvariant.config.fields import TRAINER_OWN, trainer_config_class
from rlinvariant.config.tree import leaves
from rlinvariant.conflicts import Gradients
from rlinvariant.errors import Stopped, outcome, stop_code
from rlinvariant.journal import Journal
from rlinvariant.kernels import choice
from rlinvariant.launch import is_launched, is_sharded, on_main_process, rank
from rlinvariant.report.console import Console
from rlinvariant.resumption import dataset_digest, find, require_same_data
from rlinvariant.rewards import RewardLimits
from rlinvariant.run import carry_out, directory, train_on
from rlinvariant.text import say
from rlinvariant.tools import ToolLimits
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from datasets import Dataset

    from rlinvariant.plan import TrainerPlan
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer


def script_name() -> str:
    """Return the name of the script that runs, or "notebook" where there is none."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    return name if name.endswith(".py") and name != "ipykernel_launcher.py" else "notebook"


def steps_of(args: Any, rows: int) -> int:
    """Return how many optimizer steps TRL will take: `max_steps`, or what the epochs come to.

    Args:
        args: TRL's configuration.
        rows: of the training data.
    """
    if args.max_steps > 0:
        return args.max_steps
    rollouts = rows // (args.generation_batch_size // args.num_generations)  # TRL drops an incomplete one
    batches = rollouts * args.steps_per_generation * args.num_iterations
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


class ScriptRun:
    """Stands for the run directory of a script's trainer, as `rlinvariant.run` does for the command line's.

    Args:
        config: what `run_config` returned.
        plan: the trainer's, whose checkpoints go to the run's directory.
        console: where lines go.
    """

    def __init__(self, config: Config, plan: TrainerPlan, console: Console) -> None:
        self.config, self.plan, self.console = config, plan, console

    def problems(self) -> list[str]:
        """List why the directory cannot be used."""
        return check_run(self.config, os.environ)

    def start(self, train_dataset: Dataset | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Find what the run goes on from, and return the trainer's hooks into the journal, which also call the user's own.

        Raises:
            UserError: the run that is there is another one, or damaged.
        """
        resumption = on_main_process(lambda: find(self.config))
        if resumption.checkpoint is not None:
            resumption.checkpoint.require_layout(self.plan.args.world_size, is_sharded())
        data = "" if train_dataset is None else dataset_digest(train_dataset)
        self.resumption = require_same_data(resumption, data, self.config)
        for line in self.resumption.lines:
            self.console.print(line)
        main = self.plan.args.process_index == 0
        sampler: Mapping[str, Any] = self.plan.sampler_options
        self.journal = Journal(self.config, self.plan.source, sampler, self.console, main, data, self.resumption)
        hooks = ("on_row", "on_evaluation", "on_samples", "on_rollout")
        return {name: _both(getattr(self.journal, name), options.get(name)) for name in hooks}

    def carry_out(self, trainer: InvariantGRPOTrainer, eval_dataset: object, train: Callable[[Any], Any]) -> Any:
        """Train from where the run stands, and return what `train` returns, which is called with a checkpoint or None.

        Of a run that has done all its steps, that is a `TrainOutput` without a loss.

        Raises:
            Stopped: a signal has ended the run, after a step that is saved.
        """
        trainer.on_save = self.journal.on_save
        held_out = eval_dataset if isinstance(eval_dataset, datasets.Dataset) else None
        results = []

        def steps() -> int:
            go_on = lambda checkpoint: results.append(train(checkpoint))  # noqa: E731
            return train_on(trainer, self.resumption.checkpoint, self.config.steps, self.console, go_on)

        echo_s = stopping.ECHO_S if is_launched() else 0.0
        with _code_of_a_signal(), stopping.listening(self.config.again, echo_s, rank() == 0), directory(self.config):
            carry_out(self.journal, trainer, held_out, steps, may_end_early=True)
        return results[0] if results else TrainOutput(trainer.state.global_step, math.nan, {})


@contextmanager
def _code_of_a_signal() -> Iterator[None]:
    """Let a script that does not catch `Stopped` end as a command does: with a line, and the exit code that shells give it."""
    try:
        yield
    except Stopped:
        sys.excepthook = functools.partial(_end, sys.excepthook)  # `finally` of the script comes before it
        raise


def _end(otherwise: Callable[..., object], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not isinstance(error, Stopped):
        otherwise(kind, error, trace)
        return
    if rank() == 0:
        say(str(error) or outcome(error), error=True)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(stop_code(error))


def _both(first: Callable[..., object], second: Callable[..., object] | None) -> Callable[..., None]:
    """Return a function that calls two with the same arguments."""

    def call(*args: Any) -> None:
        first(*args)
        if second is not None:
            second(*args)

    return call


def _lora(adapter: Any) -> LoraConfig:
    """Describe PEFT's configuration as the command line describes it."""
    if adapter is None:
        return LoraConfig()
    targets = adapter.target_modules
    return LoraConfig(
        r=adapter.r,
        alpha=adapter.lora_alpha,
        target_modules=[targets] if isinstance(targets, str) else sorted(targets or ()),
        use_rslora=adapter.use_rslora,
    )


def run_config(
    run: str,
    resume: bool | str,
    plan: TrainerPlan,
    rows: int,
    limits: RewardLimits,
    tool_limits: ToolLimits,
    staleness: int,
    gradients: Gradients,
    tokens_per_microbatch: int | None,
    to_wandb: bool,
    adapter: Untyped = None,
) -> Config:
    """Describe a script's run as the command line describes its own.

    Args:
        run, resume: as the user gave them to the trainer.
        plan: the trainer's.
        rows: of the training data.
        limits: how reward functions are called.
        tool_limits: how tools are called.
        staleness, gradients, tokens_per_microbatch: as for the trainer.
        to_wandb: whether W&B gets the run.
        adapter: a `peft.LoraConfig`; None: all weights are trained.
    """
    args, fields = plan.args, chz.chz_fields(trainer_config_class())
    options = {**(plan.sampler_options.get("options") or {})}
    sizes = {key: plan.sampler_options[key] for key in ("max_model_len", "kv_cache_gib") if key in plan.sampler_options}
    own = {key: options[key] for key in chz.chz_fields(SamplerConfig) if key in options}
    trainer = {name: getattr(args, name) for name in fields if name not in TRAINER_OWN}
    trainer |= {"tokens_per_microbatch": tokens_per_microbatch}
    parts = {"ppo": PPOConfig(), "lora": LoraConfig(), "sampler": SamplerConfig(), "wandb": WandbConfig()}
    default = Config(recipe="", data=Data(), trainer=trainer_config_class()(), **parts)
    config = chz.replace(
        default,
        recipe=script_name(),
        model=plan.source,
        invariance=plan.invariance,
        algorithm="grpo" if plan.ppo is None else "ppo",
        staleness=staleness,
        gradients=gradients,
        reward_timeout=limits.reward_timeout,
        reward_cage=limits.reward_cage,
        reward_errors=limits.reward_errors,
        tool_timeout=tool_limits.tool_timeout,
        tool_cage=tool_limits.tool_cage,
        tool_errors=tool_limits.tool_errors,
        steps=steps_of(args, rows),
        seed=args.seed,
        run=run,
        resume=resume,
        save_minutes=None,
        dtype=plan.dtype,
        attention=choice.chosen(),
        save_dtype=plan.save_dtype,  # type: ignore[arg-type]  # checked before
        trainer=trainer_config_class()(**trainer),
        ppo=plan.ppo or PPOConfig(),
        lora=_lora(adapter),
        sampler=SamplerConfig(**sizes, **own),
        wandb=WandbConfig(
            mode="auto" if to_wandb else "disabled", project=os.environ.get("WANDB_PROJECT") or WandbConfig().project
        ),
    )
    before = leaves(default)
    sources = {key: SCRIPT for key, leaf in leaves(config).items() if leaf.value != before[key].value} | {"run": SCRIPT}
    return chz.replace(config, sources=sources)
