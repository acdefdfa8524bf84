"""One run, from a configuration to a trained model and its proof. Read this file to see how the parts fit together."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlinvariant import runtime
from rlinvariant.arguments import model_problems
from rlinvariant.config import Config, PPOConfig
from rlinvariant.conflicts import INVARIANCE, SIDES, Invariance, conflicts, ppo_conflicts
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir, read_metrics
from rlinvariant.rollout import Rollout


def run(config: Config) -> None:
    """Train as `config` says. Raises UserError for what the user can mend; the run directory then says how far it came."""
    started = time.monotonic()
    runtime.configure()
    args = config.grpo_config()  # imports TRL, and starts the process group, if there is one
    from transformers.utils import logging as transformers_logging

    main = args.process_index == 0
    console, recipe, run_dir = Console(main), config.load_recipe(), RunDir(config.run_dir)
    _require_device(args, config.invariance, config.dtype)  # before a recipe makes its model
    console.print(f"{config.recipe}: invariance={config.invariance}, {config.steps} steps, files in {config.run_dir}")
    if config.staleness:
        lag = f"staleness={config.staleness}: the sampler's weights lag by as many steps"
        console.print(f"{lag}; log-probs of two versions are counted, not required to be equal")
    runtime.quiet()
    transformers_logging.disable_progress_bar()  # of a model that a recipe saves too
    model_path = config.model or (recipe.prepare_model or _no_model)(config)
    with console.stage("loading transformers, TRL and vLLM"):
        from transformers import AutoTokenizer

        from rlinvariant.ops.linear import forget_routes
        from rlinvariant.report import html, rollouts, wandb_log
        from rlinvariant.trainer.evaluate import greedy_reward
        from rlinvariant.verification import certificate
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UserError(f"model={model_path}: no tokenizer: {one_line(error, 400)}") from error
    train_dataset, eval_dataset = recipe.datasets(config, tokenizer)
    log_to_wandb: wandb_log.Log | None = None

    def on_row(row: dict[str, Any], first_mismatch: Any) -> None:
        run_dir.append_metrics(row)
        console.step(row, config.steps, first_mismatch)
        if log_to_wandb is not None:
            log_to_wandb(row, row["step"])

    def on_samples(rows: list[dict[str, Any]]) -> None:
        run_dir.append_samples(rows)
        console.samples(rows)

    def on_rollout(step: int, rollout: Rollout) -> None:
        """For `rlinvariant replay`, with all that decides its bits: a run that is resumed may go on with other settings."""
        initial = os.path.abspath(model_path) if os.path.isdir(model_path) else model_path
        about = {
            "weights": initial if step == 1 else f"checkpoint-{step - 1}",
            "invariance": config.invariance,
            "dtype": config.dtype,
            "sampler": _sampler_options(config),
            "subject": certificate.subject(trainer.accelerator.unwrap_model(trainer.model).config, config.dtype),
        }
        rollouts.write(run_dir.path, step, rollout, about)

    with console.stage("starting the vLLM engine and checking the model"):
        trainer = grpo_trainer(
            model_path,
            recipe.reward_funcs(config),
            args,
            train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            ppo=config.ppo if config.algorithm == "ppo" else None,
            invariance=config.invariance,
            staleness=config.staleness,
            dtype=config.dtype,
            sampler_options=_sampler_options(config),
            on_row=on_row,
            on_samples=on_samples,
            on_rollout=on_rollout,
        )
    forget_routes()
    before = after = None
    finish_wandb: Callable[[], None] = lambda: None  # noqa: E731
    record: dict[str, Any] = {"vllm_environment": runtime.VLLM, "proof": trainer.proof}
    if main:  # nothing is written before the run can start
        RunDir.create(config.run_dir, config.resolved(), config.resume)
        record["wandb"], log_to_wandb, finish_wandb = wandb_log.start(config.wandb, config.run_dir, config.resolved())
        if eval_dataset is not None:
            with console.stage(f"held-out accuracy before, greedy, {len(eval_dataset)} prompts"):
                before = greedy_reward(trainer, eval_dataset)
            console.print(f"held-out accuracy before: {before if before is None else round(before, 3)}")
        kernels = _kernels(config)
        console.print("kernels: " + ", ".join(f"{name}: {value}" for name, value in kernels.items()))
        run_dir.write_environment({"kernels": kernels, **record})
    trainer.train(resume_from_checkpoint=config.resume and any(Path(str(args.output_dir)).glob("checkpoint-*")))
    trainer.sync(force=True)
    if main:
        if eval_dataset is not None:
            with console.stage("held-out accuracy after"):
                after = greedy_reward(trainer, eval_dataset)
        finish_wandb()
        run_dir.write_environment({"kernels": _kernels(config), **record})
        if args.device.type == "cuda":
            total, peak = memory_gib()
            console.print(f"GPU memory  {peak:.1f} GiB at PyTorch's peak, trainer and sampler together, of {total:.1f}")
        seconds = time.monotonic() - started
        console.summary(read_metrics(run_dir.path), before, after, run_dir.path, seconds)
        run_dir.write_result({"finished": True, "accuracy_before": before, "accuracy_after": after, "seconds": seconds})
        console.print(f"report      {html.write(run_dir.path)[0]}")


def grpo_trainer(
    model: Any,
    reward_funcs: Any,
    args: Any,
    train_dataset: Any,
    *,
    ppo: PPOConfig | None = None,
    invariance: Invariance = "exact",
    dtype: str = "bfloat16",
    sampler_model: str | None = None,
    sampler_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """An exact GRPO trainer from TRL's own arguments: the one call that a TRL script changes.

    Args:
        model: directory or hub id of a Hugging Face causal LM, or a loaded one with fp32 parameters.
        reward_funcs, args, train_dataset: as for `trl.GRPOTrainer`; `args` with use_vllm=False and bf16=False.
        ppo: PPO's settings, for a PPO trainer in place of a GRPO one: `trainer.ppo.InvariantPPOTrainer`.
        invariance: "exact", "off", "sampler" or "trainer".
        dtype: "bfloat16" or "float32", of both sides' activations; parameters are trained in fp32.
        sampler_model: what vLLM loads; by default the model's own directory or id.
        sampler_options: of `sampler.engine.Sampler`: max_model_len, kv_cache_gib, options (keyword arguments of
        vllm.LLM). kwargs: of `trainer.InvariantGRPOTrainer` and `trl.GRPOTrainer`.

    Raises:
        UserError: in one list, what would break exactness; see InvariantGRPOTrainer.
    """
    runtime.quiet()
    problems = [] if invariance in INVARIANCE else [f"invariance={invariance}: expected one of {', '.join(INVARIANCE)}"]
    problems += [] if dtype in ("bfloat16", "float32") else [f"dtype={dtype}: expected bfloat16 or float32"]
    source = sampler_model or (model if isinstance(model, (str, Path)) else model.config._name_or_path)
    if isinstance(model, (str, Path)):
        problems += model_problems("model", str(model))
    if not source:
        problems.append("sampler_model: missing; save the model and name its directory, for vLLM to load")
    problems += conflicts(args, invariance, os.environ) + (ppo_conflicts(args, ppo) if ppo is not None else [])
    if problems:
        raise ConfigErrors(problems)
    runtime.configure()
    _require_device(args, invariance, dtype)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from rlinvariant.models import UnsupportedModel, unsupported
    from rlinvariant.models.load import load
    from rlinvariant.sampler.engine import Sampler, refuse
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

    if SIDES[invariance][0]:
        given = sampler_options or {}
        refuse(given.get("options") or {}, str(source), dtype, given.get("max_model_len"))
    transformers_logging.disable_progress_bar()
    if isinstance(model, (str, Path)):
        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UserError(f"model={model}: cannot be loaded: {one_line(error, 400)}") from error
        if invariance != "off" and (reasons := list(unsupported(config, args.device.type))):  # before loading weights
            kind = ", ".join(config.architectures or [type(config).__name__])
            raise UnsupportedModel(f"model={model}: {kind} cannot run exactly: {'; '.join(reasons)}; use invariance=off")
        model = load(AutoModelForCausalLM, model, dtype=torch.float32)
    engine: Callable[[], Sampler] = lambda: Sampler(  # noqa: E731
        source, invariant=SIDES[invariance][0], dtype=dtype, **(sampler_options or {})
    )
    console = Console(args.process_index == 0)
    kwargs.setdefault("on_row", lambda row, first_mismatch: console.step(row, args.max_steps, first_mismatch))
    if ppo is not None:
        from rlinvariant.trainer.ppo import InvariantPPOTrainer

        kind = functools.partial(InvariantPPOTrainer, ppo=ppo)
    else:
        kind = InvariantGRPOTrainer
    try:
        trainer = kind(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            invariance=invariance,
            dtype=getattr(torch, dtype),
            sampler=engine,
            **kwargs,
        )
    except UnsupportedModel as error:
        raise UnsupportedModel(f"model={source}: {error}; use invariance=off") from error
    if invariance == "exact":
        from rlinvariant.verification.start import prove

        trainer.sync(force=True)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        line, trainer.proof = prove(policy, trainer.sampler, AutoConfig.from_pretrained(source), str(source), dtype)
        console.print(line)
    return trainer


def ppo_trainer(*args: Any, ppo: PPOConfig | None = None, **kwargs: Any) -> Any:
    """An exact PPO trainer from TRL's own arguments: `grpo_trainer`'s, and PPO's settings."""
    return grpo_trainer(*args, ppo=ppo or PPOConfig(), **kwargs)


def memory_gib() -> tuple[float, float]:
    """(all, most ever taken by this process through PyTorch) of the GPU's memory."""
    import torch

    return torch.cuda.get_device_properties().total_memory / 2**30, torch.cuda.max_memory_reserved() / 2**30


def _require_device(args: Any, invariance: str, dtype: str) -> None:
    import torch

    from rlinvariant.support import device_problems

    if problems := device_problems(args, invariance, getattr(torch, dtype)):
        raise ConfigErrors(problems)


def _no_model(config: Config) -> str:
    raise UserError(f"model: missing, recipe {config.recipe} has none of its own; write model=DIRECTORY or model=ORG/NAME")


def _sampler_options(config: Config) -> dict[str, Any]:
    s = config.sampler
    options: dict[str, Any] = {
        "max_num_seqs": s.max_num_seqs,
        "enable_prefix_caching": s.enable_prefix_caching,
    }
    if s.enforce_eager is not None:
        options["enforce_eager"] = s.enforce_eager
    if s.max_num_batched_tokens is not None:
        options["max_num_batched_tokens"] = s.max_num_batched_tokens
    return {"max_model_len": s.max_model_len, "kv_cache_gib": s.kv_cache_gib, "options": options}


def _kernels(config: Config) -> dict[str, str]:
    """What computed this run, and which linear shapes the self-check let the vendor GEMM have."""
    if config.invariance == "off":
        return {"sampler": "stock vLLM", "trainer": "stock transformers"}
    import torch

    from rlinvariant.kernels import cpu
    from rlinvariant.ops.linear import routes

    by_route: dict[str, list[str]] = {}
    for shape, route in sorted(routes().items()):
        by_route.setdefault(route, []).append(shape)
    linear = "; ".join(f"{route} for {' '.join(shapes)}" for route, shapes in by_route.items())
    if torch.cuda.is_available():
        return {"linear": linear, "attention": "FlashAttention-3, one split", "other ops": "kernels/*.py, Triton"}
    return {"linear": linear, "other ops": f"kernels/*.c, gcc {' '.join(cpu.FLAGS[:3])}"}
