"""Construct once, for a matrix of 8 x 8, what a run constructs later: optimizer, scheduler, reports, ...; and try the hub."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.training_args import trainer_log_levels

from rlinvariant.errors import UserError, one_line
from rlinvariant.text import plural, shown

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

SCHEDULED_STEPS = 1000  # most steps for which the learning rate is looked at


class _Parts(Trainer):
    """Makes an optimizer and its scheduler by transformers' own constructors, without the rest of a trainer."""

    def __init__(self, args: "GRPOConfig", model: torch.nn.Module) -> None:
        self.args, self.model = args, model
        self.optimizer: Any = None
        self.lr_scheduler = self.optimizer_cls_and_kwargs = None


def part_problems(args: "GRPOConfig", prefix: str = "") -> list[str]:
    """List the settings by which optimizer, scheduler, data loader, reports or logging cannot be made, or would not work.

    Args:
        args: TRL's configuration.
        prefix: what the user writes before a field's name.
    """
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).to(args.device)
        parts = _Parts(args, model)
        settings = "optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon"
        found = _attempt(args, prefix, "optimizer", settings, lambda: _step(parts, model))
        if not found:
            settings = "lr_scheduler_type lr_scheduler_kwargs warmup_steps"
            found = _attempt(args, prefix, "scheduler", settings, lambda: _schedule(parts))
        settings = "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers"
        found += _attempt(args, prefix, "data loader", settings, lambda: _loader(args))
    found += _attempt(args, prefix, "callback", "report_to", lambda: _reports(args))
    levels = {name: getattr(args, name) for name in ("log_level", "log_level_replica")}
    expected = f"expected one of {', '.join(trainer_log_levels)}"
    return found + [
        f"{prefix}{name}={shown(level)}: {expected}" for name, level in levels.items() if level not in trainer_log_levels
    ]


def evaluation_problems(args: "GRPOConfig", prefix: str = "") -> list[str]:
    """Say why an evaluation would cut groups in pieces. TRL looks only where `eval_strategy` asks for some, and takes 0."""
    group = args.num_generations if args.num_generations_eval is None else args.num_generations_eval
    sizes = {"per_device_eval_batch_size": args.per_device_eval_batch_size, "num_generations_eval": group or 1}
    if found := [f"{prefix}{name}={size}: expected at least 1" for name, size in sizes.items() if size < 1]:
        return found
    batch, group = sizes.values()
    if batch * args.world_size % group == 0:
        return []
    expected = f"expected a multiple of {group}, the completions of a prompt, with {plural(args.world_size, 'process')}"
    return [f"{prefix}per_device_eval_batch_size={batch}: {expected}; set it, or {prefix}num_generations_eval"]


@contextmanager
def constructing() -> Iterator[None]:
    """Turn a setting that TRL's or transformers' constructor refuses, and nothing above has found, into one line.

    Raises:
        UserError: as it says.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using '(rollout_func|environment_factory)'")  # an experiment of TRL's
            yield
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"TRL cannot make the trainer: {one_line(error)}; change that setting") from error


def _attempt(args: Any, prefix: str, part: str, settings: str, make: Callable[[], str | None]) -> list[str]:
    """Make a part, and list why that fails, with the settings that decide it."""
    try:
        wrong = make()
    except Exception as error:  # each optimizer raises types of its own
        wrong = f"{type(error).__name__}: {one_line(error)}"
    if not wrong:
        return []
    given = " ".join(f"{prefix}{name}={shown(_plain(getattr(args, name)), 60)}" for name in settings.split())
    return [f"{given}: the {part} cannot be made: {wrong}; change one of them"]


def _step(parts: _Parts, model: torch.nn.Module) -> None:
    optimizer: Any = parts.create_optimizer(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()


def _schedule(parts: _Parts) -> str | None:
    """Go through the schedule, and return the first learning rate that is none."""
    steps = max(1, int(parts.args.max_steps))
    scheduler: Any = parts.create_scheduler(steps, parts.optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return None  # steps by a metric
    for step in range(min(steps, SCHEDULED_STEPS)):
        for rate in scheduler.get_last_lr():
            if not 0 <= float(rate) < math.inf:
                return f"the learning rate of step {step + 1} is {float(rate):g}"
        parts.optimizer.step()
        scheduler.step()
    return None


def _loader(args: Any) -> None:
    rows: Any = [0]
    torch.utils.data.DataLoader(
        rows,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None) or None,
    )


def _reports(args: Any) -> None:
    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def weight_problems(args: "GRPOConfig", rewards: object, prefix: str = "") -> list[str]:
    """List what is wrong with the weights of the rewards: their number, or a weight that is none."""
    if (weights := args.reward_weights) is None:
        return []
    count = len(rewards) if isinstance(rewards, list) else 1
    given = f"{prefix}reward_weights={shown(weights)}"
    if len(weights) != count:
        return [f"{given}: expected {count}, one for each reward function"]
    return [] if all(map(math.isfinite, weights)) else [f"{given}: expected finite numbers"]


def hub_problems(args: "GRPOConfig", prefix: str = "") -> list[str]:
    """Say why the hub cannot be used, if the run is to write to it; asks the hub who the user is."""
    wanted = next((name for name in ("push_to_hub", "log_completions_hub_repo") if getattr(args, name, None)), None)
    if wanted is None:
        return []
    import huggingface_hub

    given = f"{prefix}{wanted}={shown(getattr(args, wanted))}"
    strategy = _plain(args.hub_strategy)
    if args.push_to_hub and strategy not in ("end", "every_save"):
        what = "end or every_save: the published model is what is uploaded, not checkpoints"
        return [f"{prefix}hub_strategy={shown(strategy)}: expected {what}"]
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return [f"{given}: HF_HUB_OFFLINE switches the hub off; unset it, or remove {prefix}{wanted}"]
    token = args.hub_token or huggingface_hub.get_token()
    if not token:
        return [f"{given}: no login at the hub; set HF_TOKEN, or run `hf auth login`, or remove it"]
    try:
        huggingface_hub.HfApi().whoami(token=token)
    except Exception as error:  # of the network, of HTTP, of the hub
        return [f"{given}: the hub does not answer, or not to this token: {one_line(error)}; mend that, or remove it"]
    return []
