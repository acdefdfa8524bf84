"""TRL's names for a script that trains exactly: one import changes, and everything else stays."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from transformers.trainer_utils import TrainOutput

from rlinvariant import plan, runtime
from rlinvariant.config import PPOConfig
from rlinvariant.conflicts import INVARIANCE, Invariance
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import RUNS, require_writable
from rlinvariant.model_source import load_tokenizer, local_model, source_problems
from rlinvariant.report import wandb_log
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir
from rlinvariant.rewards import RewardLimits, reward_problems
from rlinvariant.run import train_on
from rlinvariant.script import ScriptRun, run_config
from rlinvariant.support import device_problems
from rlinvariant.tools import ToolLimits
from rlinvariant.trainer.fields import GRPOConfig, script_problems, settled
from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from rlinvariant.trainer.interface import RewardFunction, ScriptOptions
from rlinvariant.trainer.ppo import InvariantPPOTrainer
from rlinvariant.trainer.preflight import Tooling, check_start
from rlinvariant.trainer.preflight.given import given_problems
from rlinvariant.trainer.refusals import settings_problems
from rlinvariant.types import EnvironmentFactory, RolloutCall, ToolCall

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig as TRLConfig

    from rlinvariant.trainer.interface import StartOptions

DTYPES = ("bfloat16", "float32")
SAVE_DTYPES = ("model", "bfloat16", "float16", "float32")


class GRPOTrainer(InvariantGRPOTrainer):
    """Trains as `trl.GRPOTrainer` does, exactly, from the same arguments: loads the model, starts the engine, compares the two.

    Args:
        model: directory or hub id of a Hugging Face causal LM, or a loaded one with fp32 parameters, which is patched in place.
        reward_funcs, args, train_dataset, ... environment_factory: as for `trl.GRPOTrainer`, in the same order. What has to be
            otherwise in `args` is set in a copy, and said in one line, or refused; `use_vllm=True` means the engine here.
        run: name under runs/ of a directory that gets what a run of `rlinvariant train` leaves: metrics, samples, rollouts,
            checkpoints, the report; W&B, if it is in `args.report_to`, gets the same keys. None: what TRL writes.
        resume: whether `run` goes on from its newest checkpoint; "force": also with settings that make another run of it.
        invariance: which sides run the invariant ops: "exact" both, "off" none, "sampler" or "trainer" that one only.
        dtype: "bfloat16" or "float32", of both sides' activations; parameters are trained in fp32.
        sampler_model: what vLLM loads; by default the model's own directory or id.
        sampler_options: max_model_len (tokens), kv_cache_gib (GiB), and options: keyword arguments of `vllm.LLM`.
        save_dtype: of the weights that `save_model` and `push_to_hub` write: "model" as they came, "bfloat16", "float16" or
            "float32". Checkpoints keep the fp32 parameters, from which training goes on.
        options: further arguments of `InvariantGRPOTrainer`: staleness, gradients, tokens_per_microbatch, recompute,
            reward_timeout, reward_cage, reward_errors, tool_timeout, tool_cage, tool_errors, on_row, on_evaluation, on_samples,
            on_rollout.
            Without `run` and `on_row`, each step prints its line.

    The trainer is ready for `train`; `proof` says what was compared, or which certificate was found.

    Raises:
        ConfigErrors: everything that would break exactness or cannot be done, in one list, before weights are loaded.
        UserError: the model or a dataset cannot be used.
        UnsupportedModel: the model computes something that no op owns.
        ParityError: with invariance="exact", a log-prob differs before the first step.

    Example:
        >>> args = GRPOConfig("out", max_completion_length=256)
        >>> trainer = GRPOTrainer("Qwen/Qwen3-0.6B", reward, args, prompts, run="first")
        >>> trainer.train()
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: TRLConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: object = None,
        peft_config: object = None,
        tools: list[ToolCall] | None = None,
        rollout_func: RolloutCall | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        run: str | None = None,
        resume: bool | str = False,
        **options: Unpack[ScriptOptions],
    ) -> None:
        given: dict[str, Any] = {"eval_dataset": eval_dataset, "processing_class": processing_class, "callbacks": callbacks}
        given |= {"reward_processing_classes": reward_processing_classes, "optimizers": optimizers, **options}
        others = {"quantization_config": quantization_config, "peft_config": peft_config, "tools": tools}
        others |= {"rollout_func": rollout_func, "environment_factory": environment_factory}
        given |= {name: value for name, value in others.items() if value is not None}
        wanted = {"model": model, "args": args, "run": run, "resume": resume, "ppo": self._settings}
        if wrong := given_problems(given | wanted):
            raise ConfigErrors(wrong)
        if args is None:
            name = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
            args = GRPOConfig(f"{Path(name).name}-GRPO")  # as TRL does
        console = Console(args.process_index == 0)
        ready, self._run = _checked(console, model, reward_funcs, args, train_dataset, self._settings, run, resume, given)
        if self._run is None:
            given.setdefault("on_row", lambda row, mismatch: console.step(row, self.state.max_steps, mismatch))
            given.setdefault("on_evaluation", console.evaluation)
        else:
            given |= self._run.start(train_dataset, given)
        with plan.named(ready):
            super().__init__(**plan.arguments(ready, reward_funcs, train_dataset, **given))
        plan.prove(ready, self)

    _settings: PPOConfig | None = None

    def train(self, resume_from_checkpoint: bool | str | None = None, *args, **kwargs):
        """Train as TRL does; with `run`, between two evaluations of the held-out rows, and written into the run's directory.

        Raises:
            UserError: `run` was given, and is to go on from a checkpoint that is not its own.
            ParityError: as `InvariantGRPOTrainer` says.
        """
        if self._run is None:
            checkpoint = self._checkpoint(resume_from_checkpoint)
            if checkpoint is None or not 0 < self.args.max_steps <= checkpoint.step:
                return super().train(checkpoint, *args, **kwargs)
            done = train_on(self, checkpoint, self.args.max_steps, Console(self.args.process_index == 0), super().train)
            return TrainOutput(done, math.nan, {})
        if resume_from_checkpoint:
            raise UserError(
                f"resume_from_checkpoint: expected none with run={self._run.config.run}; write resume=True beside run="
            )
        return self._run.carry_out(
            self, self.eval_dataset, lambda checkpoint: super(GRPOTrainer, self).train(checkpoint, *args, **kwargs)
        )

    def close(self) -> None:
        """Give the engine's memory back, as for a second trainer on one GPU. The trainer can save, and not sample any more."""
        self.sampler.close()


class PPOTrainer(GRPOTrainer, InvariantPPOTrainer):
    """Trains by PPO, with a critic, from the arguments of `GRPOTrainer` and `ppo`.

    Args:
        ppo: settings of PPO; None: the defaults of `PPOConfig`.
        model, reward_funcs, ...: as for `GRPOTrainer`, which also says what is raised.

    TRL has a class of this name, in `trl.experimental`, with other arguments: a reward model and a value model.

    Example:
        >>> trainer = PPOTrainer("Qwen/Qwen3-0.6B", reward, GRPOConfig("out"), prompts, ppo=PPOConfig(kl_coef=0.05))
        >>> trainer.train()
    """

    def __init__(self, *args, ppo: PPOConfig | None = None, **kwargs) -> None:
        self._settings = PPOConfig() if ppo is None else ppo
        super().__init__(*args, **kwargs)


def grpo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: TRLConfig | None = None,
    train_dataset: Dataset | None = None,
    **options: Unpack[StartOptions],
) -> GRPOTrainer:
    """Make a `GRPOTrainer`, which says what the arguments are, and what is raised.

    Example:
        >>> trainer = rlinvariant.grpo_trainer("Qwen/Qwen3-0.6B", reward, GRPOConfig("out"), prompts)
        >>> trainer.train()
    """
    return GRPOTrainer(model, reward_funcs, args, train_dataset, **options)


def ppo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: TRLConfig | None = None,
    train_dataset: Dataset | None = None,
    *,
    ppo: PPOConfig | None = None,
    **options: Unpack[StartOptions],
) -> PPOTrainer:
    """Make a `PPOTrainer`, which says what the arguments are, and what is raised.

    Example:
        >>> trainer = rlinvariant.ppo_trainer("Qwen/Qwen3-0.6B", reward, args, prompts, ppo=rlinvariant.PPOConfig(kl_coef=0.05))
        >>> trainer.train()
    """
    return PPOTrainer(model, reward_funcs, args, train_dataset, ppo=ppo, **options)


def _checked(
    console: Console,
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: TRLConfig,
    train_dataset: Dataset | None,
    ppo: PPOConfig | None,
    run: str | None,
    resume: bool | str,
    options: dict[str, Any],
) -> tuple[plan.TrainerPlan, ScriptRun | None]:
    """Check everything, and print what was set otherwise; takes out of `options` what is the plan's, and adds a tokenizer.

    Raises:
        ConfigErrors: everything that has to be mended, in one list.
    """
    runtime.quiet()
    loaded = None if isinstance(model, (str, Path)) else model
    invariance: Invariance = options.pop("invariance", "exact")
    dtype, sampler_model = options.pop("dtype", "bfloat16"), options.pop("sampler_model", None)
    sampler: dict[str, Any] = dict(options.pop("sampler_options", None) or {})
    source = sampler_model or (str(model) if loaded is None else loaded.config._name_or_path)
    places = source_problems("model", str(model)) if loaded is None else []
    if not source:
        places.append("sampler_model: missing; save the model and name its directory, for vLLM to load")
    elif str(source) != str(model):
        places += source_problems("sampler_model" if sampler_model else "model", str(source))
    places += source_problems("ppo.critic", ppo.critic) if ppo is not None and ppo.critic is not None else []
    sides = [] if invariance in INVARIANCE else [f"invariance={invariance}: expected one of {', '.join(INVARIANCE)}"]
    save_dtype: str = options.pop("save_dtype", "model")
    sides += [] if save_dtype in SAVE_DTYPES else [f"save_dtype={save_dtype}: expected one of {', '.join(SAVE_DTYPES)}"]
    sides += [] if dtype in DTYPES else [f"dtype={dtype}: expected {' or '.join(DTYPES)}"]
    problems = sides + places + reward_problems(reward_funcs) + ToolLimits.taken(dict(options)).problems()
    for index, reward in enumerate(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
        problems += source_problems(f"reward function {index}", reward) if isinstance(reward, str) else []
    if train_dataset is None:
        problems.append("train_dataset: missing; give a datasets.Dataset with a column prompt")
    if run is None and args.output_dir is not None:
        out = Path(args.output_dir).absolute()
        if own := next((path for path in (out, out.parent) if RunDir(path).is_there), None):
            fix = "choose another, or write run=, which has a directory of its own"
            problems.append(
                f"output_dir={args.output_dir}: {own} is the directory of a run, and its checkpoints would be lost; {fix}"
            )
        try:
            require_writable(Path(args.output_dir), f"output_dir={args.output_dir}", "choose another", directory=True)
        except UserError as error:
            problems.append(str(error))
    if sides:
        raise ConfigErrors(problems)
    if args.use_vllm and args.vllm_max_model_length is not None:
        sampler.setdefault("max_model_len", args.vllm_max_model_length)
    problems += script_problems(args, invariance)
    to_wandb = "wandb" in (args.report_to or [])
    args, said = settled(args, invariance, run)
    problems += settings_problems(args, invariance, getattr(torch, dtype), options, ppo, loaded)
    asks = to_wandb and run is None and os.environ.get("WANDB_MODE", "online") == "online"
    if asks and not wandb_log.login("report_to=wandb", "WANDB_MODE=offline"):
        fix = "run `wandb login`, set WANDB_MODE=offline, or give the trainer run=NAME"
        problems.append(f"report_to=wandb: no login found; {fix}")
    ready = script_run = None
    notes: list[str] = []
    if not places and not device_problems(args, invariance, getattr(torch, dtype)):  # else there is nothing to look at
        try:
            runtime.configure()
            model, source = local_model(str(model)) if loaded is None else model, local_model(str(source))
            how = (invariance, dtype, str(source), sampler, save_dtype)
            ready = plan.plan_trainer(model, args, ppo, *how, _adapter(model, options), "peft_config.")
            notes = _look(ready, reward_funcs, train_dataset, options, run)
        except UserError as error:
            problems += str(error).splitlines()
    if ready is not None and run is not None:
        rows = len(train_dataset) if train_dataset is not None else 0
        limits, staleness = RewardLimits.taken(dict(options)), options.get("staleness", 0)
        tool_limits = ToolLimits.taken(dict(options))
        tokens, gradients = options.get("tokens_per_microbatch"), options.get("gradients", "stock")
        adapter = _adapter(model, options)
        config = run_config(run, resume, ready, rows, limits, tool_limits, staleness, gradients, tokens, to_wandb, adapter)
        script_run = ScriptRun(config, ready, console)
        problems += script_run.problems()
    if problems:
        raise ConfigErrors([*dict.fromkeys(problems)])  # of rewards, perhaps twice
    assert ready is not None, "a model that is not there is a problem"
    if said:
        console.print(f"settings of TRL, set for this run: {', '.join(said)}")
    for note in [*runtime.late_notes(), *notes]:
        console.print(f"note: {note}")
    return ready, script_run


def _adapter(model: Any, options: dict[str, Any]) -> Any:
    """Return PEFT's configuration of the adapters that are trained; None where there are none, or none that can be."""
    from rlinvariant.models import lora

    own = getattr(model, "peft_config", None) or {}
    adapter = options.get("peft_config") or own.get("default")
    return None if adapter is None or any(lora.problems(adapter)) else adapter


def _look(
    ready: plan.TrainerPlan,
    reward_funcs: RewardFunction | list[RewardFunction],
    train_dataset: Dataset | None,
    options: dict[str, Any],
    run: str | None,
) -> list[str]:
    """Look at tokenizer, rewards and rows, and return notes; adds the tokenizer to `options` if it is not there."""
    source = str(ready.source)
    tokenizer = options["processing_class"] = options.get("processing_class") or load_tokenizer(source, ready.config)
    published = Path(ready.args.output_dir or "", "model") if ready.args.push_to_hub else None
    if run is not None:
        published = RunDir(RUNS / run).model
    parts = (tokenizer, reward_funcs, train_dataset, options.get("eval_dataset"), Tooling.of(options))
    return check_start(ready.start(*parts, published=published, tokens_per_microbatch=options.get("tokens_per_microbatch")))
